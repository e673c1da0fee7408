"""Which trees are held out for validation where a data set brings no split of its own: a share of them, by hash."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from stages.common.schema import PrepareParams
from stages.conversations.duplicates import dissimilar, first_copies, normalised
from stages.conversations.selection import Selection, is_among

Sizes = Mapping[str, int]  # how many trees begin with each question


def hold_out(selection: Selection, params: PrepareParams) -> Selection:
    """Settle the split of the data sets that bring none: of each, a share `validation_fraction` of its trees.

    Trees that begin with the same question stay on one side. Questions are taken in the order of their hashes, so that
    few trees move when others come or go. Copies of a conversation count once.
    """
    text, tree, dataset, split = (selection.values(name) for name in ("text", "message_tree_id", "dataset", "split"))
    if all(isinstance(split[root], str) for root, *_ in selection.threads):
        return selection
    question: dict[str, str] = {}  # by tree
    trees: dict[int, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))  # by data set and question
    for (root, *_), counts in zip(selection.threads, _counted(selection, params), strict=True):
        if not isinstance(split[root], str):
            asked = question.setdefault(tree[root], normalised(text[root]))
            if counts:
                trees[dataset[root]][asked].add(tree[root])
    sizes = {number: {asked: len(ids) for asked, ids in of_one.items()} for number, of_one in trees.items()}
    published = any(split[root] == "validation" for root, *_ in selection.threads)
    chosen = chosen_questions(sizes, params.validation_fraction, params.split_seed, published)
    held = {
        root
        for root, *_ in selection.threads
        if tree[root] in question and question[tree[root]] in chosen.get(dataset[root], ())
    }
    settled = selection.messages["split"].mask(is_among(selection.messages["message_id"], held), "validation")
    return replace(selection, messages=selection.messages.assign(split=settled))


def _counted(selection: Selection, params: PrepareParams) -> list[bool]:
    """Which threads are no copy, and no near copy, of another."""
    unlike = dissimilar(selection, params) or [True] * len(selection.threads)
    return [first and other for first, other in zip(first_copies(selection, params), unlike, strict=True)]


def chosen_questions(sizes: Mapping[int, Sizes], fraction: float, seed: int, published: bool) -> dict[int, set[str]]:
    """The questions of each data set whose trees are held out. Where these would be none at all, and no data set has a
    `published` split, the first question of the largest one."""
    chosen = {
        number: _chosen(of_one, rounded(fraction * sum(of_one.values())), seed) for number, of_one in sizes.items()
    }
    if sizes and not published and not any(chosen.values()):
        largest = max(sizes, key=lambda number: sum(sizes[number].values()))
        chosen[largest] = _chosen(sizes[largest], 1, seed)
    return chosen


def _chosen(sizes: Sizes, wanted: int, seed: int) -> set[str]:
    """Questions in the order of their hashes, with `wanted` trees in all. Where each question has more trees than that,
    one of the questions with the fewest; never all questions."""
    chosen, room = set(), wanted
    for asked in by_hash(sizes, seed):
        if sizes[asked] <= room:
            chosen.add(asked)
            room -= sizes[asked]
    if wanted and not chosen:
        chosen = {min(by_hash(sizes, seed), key=lambda asked: sizes[asked])}
    return chosen if len(chosen) < len(sizes) else set()


def by_hash(questions: Iterable[str], seed: int) -> list[str]:
    return sorted(questions, key=lambda asked: hashlib.sha256(f"{seed}:{asked}".encode()).digest())


def rounded(number: float) -> int:
    """The nearest integer; a half goes up, also where floating point makes a little less of it (0.15 * 30)."""
    return int(number + 0.5 + 1e-9)
