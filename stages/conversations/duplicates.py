"""Conversations that repeat others: copies, near copies, and those that ask a held-out question.

Each function returns a mask over the threads of a selection: which of them stay.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache

from datasketch import MinHash, MinHashLSH

from stages.common.schema import PrepareParams
from stages.conversations.selection import Selection, Thread
from stages.conversations.splits import held_out_roots


def normalised(text: str) -> str:
    """`text` without what makes copies look different: Unicode form, case, white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def first_copies(selection: Selection, params: PrepareParams) -> list[bool]:
    """Which threads are the first with their normalised texts, system messages included."""
    text, system = selection.values("text"), selection.values("system")
    first: dict[tuple[str, ...], Thread] = {}
    for ids in _held_out_first(selection):
        systems = [f"{at} {system[i]}" for at, i in enumerate(ids) if isinstance(system[i], str)]
        first.setdefault(tuple(normalised(each) for each in (*(text[i] for i in ids), *systems)), ids)
    chosen = set(first.values())
    return [ids in chosen for ids in selection.threads]


def dissimilar(selection: Selection, params: PrepareParams) -> list[bool] | None:
    """Which threads are no near duplicate of another (see `near_duplicates`); None where max_similarity is."""
    if params.max_similarity is None:
        return None
    text, threads = selection.values("text"), _held_out_first(selection)
    copies = near_duplicates([" ".join(normalised(text[i]) for i in ids) for ids in threads], params.max_similarity)
    chosen = {ids for ids, copy in zip(threads, copies, strict=True) if not copy}
    return [ids in chosen for ids in selection.threads]


def new_questions(selection: Selection, params: PrepareParams) -> list[bool]:
    """Which threads are held out, or ask no question that begins a held-out one, not even in mid-conversation."""
    text, held = selection.values("text"), held_out_roots(selection.messages)
    questions = {normalised(text[ids[0]]) for ids in selection.threads if ids[0] in held}
    return [ids[0] in held or questions.isdisjoint(normalised(text[i]) for i in ids[::2]) for ids in selection.threads]


def _held_out_first(selection: Selection) -> list[Thread]:
    """The threads in the order in which copies are looked for: the held-out one of two copies stays, so that a
    published validation split keeps its size."""
    held = held_out_roots(selection.messages)
    return sorted(selection.threads, key=lambda ids: ids[0] not in held)


@cache  # they are looked for twice: before trees are held out, and after it
def _minhash(text: str) -> MinHash:
    words = text.split()
    minhash = MinHash(num_perm=128, seed=1)
    minhash.update_batch([" ".join(words[i : i + 3]).encode() for i in range(max(1, len(words) - 2))])
    return minhash


def near_duplicates(texts: Sequence[str], max_similarity: float) -> list[bool]:
    """Which texts share more than `max_similarity` (0 to 1) of their word triples with an earlier one that is kept.

    The Jaccard similarity is estimated from 128 MinHash permutations (Broder, On the resemblance and containment of
    documents, 1997): its standard error is at most 0.05.
    """
    index = MinHashLSH(threshold=max_similarity, num_perm=128)
    hashes: dict[int, MinHash] = {}
    copies = []
    for number, text in enumerate(texts):
        minhash = _minhash(text)
        copy = any(hashes[other].jaccard(minhash) > max_similarity for other in index.query(minhash))
        copies.append(copy)
        if not copy:
            hashes[number] = minhash
            index.insert(number, minhash)
    return copies
