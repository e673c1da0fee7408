"""Which threads are held out for validation, and which are trained on, how often."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from stages.common.errors import StageError
from stages.common.schema import PrepareParams
from stages.conversations.files import split_of
from stages.conversations.selection import Selection, Thread

# A split that files state -> what becomes of it: train, validation (held out), OTHER (left out), None (by hash).
Fates = dict[str | None, str | None]
OTHER = "other"
HELD_OUT = ("validation", "test")  # splits that are never trained on, the better one to hold out first
FATE_WORDS = {"train": "trained on", "validation": "held out", OTHER: "left out", None: "a share is held out"}
MAX_LISTED = 5  # files of a kind in a line


def settled_splits(messages: pd.DataFrame) -> dict[int, Fates]:
    """What becomes of the splits that the files of each data set state. A file of None states no split.

    A validation split is held out; where no data set has one, a test split. Otherwise a test split is left out.
    A data set without a split to hold out is trained on where another consists of such a split alone, as in a list of
    files; otherwise a share of it is held out by hash. Raises StageError when there are only test splits.
    """
    stated = {
        int(number): {split if isinstance(split, str) else None for split in found}
        for number, found in messages.groupby("dataset")["split"].unique().items()
    }
    everywhere = set().union(*stated.values())
    if everywhere == {"test"}:
        raise StageError(
            "the names of all data files state a test split, which is never trained on. Add other data, or rename them."
        )
    held = next((split for split in HELD_OUT if split in everywhere), "")
    if everywhere <= set(HELD_OUT):  # nothing else could be trained on
        return {number: {name: None if name == "validation" else OTHER for name in stated[number]} for number in stated}
    served = any(held in names and names <= set(HELD_OUT) for names in stated.values())
    return {number: _fates(names, held, served) for number, names in stated.items()}


def _fates(names: set[str | None], held: str, served: bool) -> Fates:
    """The fates of one data set's splits. `held` is the split to hold out, if any; `served` says whether another data
    set of the list is held out for it."""
    fates: Fates = dict.fromkeys(names, OTHER)
    if held in names:
        fates[held] = "validation"
    for name in names.difference(HELD_OUT):
        fates[name] = "train" if held in names or served else None
    if None in names and {"train", held} <= names:
        fates[None] = OTHER  # what stands beside both splits is often their source
    return fates


def settle_splits(selection: Selection, fates: dict[int, Fates]) -> Selection:
    """Replace the split that a file states by what becomes of it (see `settled_splits`), and drop what is left out."""
    messages = selection.messages
    settled = pd.Series(
        [
            fates[number][split if isinstance(split, str) else None]
            for number, split in zip(messages["dataset"], messages["split"], strict=True)
        ],
        index=messages.index,
        dtype=object,
    )
    return replace(selection, messages=messages.assign(split=settled)).keep(settled.ne(OTHER), "other_split")


def split_note(names: list[str], fates: Fates) -> str:
    """Which of a data set's files (by name) went where, in one line."""
    parts = []
    for fate, words in FATE_WORDS.items():
        files = [name for name in names if (split := split_of(name)) in fates and fates[split] == fate]
        more = f" and {len(files) - MAX_LISTED} more" if len(files) > MAX_LISTED else ""
        parts += [f"{words}: {', '.join(files[:MAX_LISTED])}{more}"] if files else []
    return "; ".join(parts)


def held_out_roots(messages: pd.DataFrame) -> set[str]:
    """The ids of the roots whose threads are held out."""
    return set(messages.loc[messages["parent_id"].isna() & (messages["split"] == "validation"), "message_id"])


def weighted(threads: Sequence[Thread], weight: float, seed: int) -> list[Thread]:
    """Each of `threads` as often as the whole part of `weight` says; a share as large as its fraction, once more.

    That share is drawn by hash. The order stays; a repetition follows the one before it.
    """
    times, part = divmod(weight, 1)
    by_hash = sorted(threads, key=lambda ids: hashlib.sha256(f"{seed}:{ids}".encode()).digest())
    once_more = set(by_hash[: round(part * len(threads))])
    return [ids for ids in threads for _ in range(int(times) + (ids in once_more))]


def threads_by_split(selection: Selection, params: PrepareParams) -> dict[str, list[Thread]]:
    """The threads of train, as often as `dataset_weights` says (ordered by data set), and of validation."""
    held = held_out_roots(selection.messages)
    train = [ids for ids in selection.threads if ids[0] not in held]
    if params.dataset_weights is not None:
        dataset = selection.values("dataset")
        train = [
            ids
            for number, weight in enumerate(params.dataset_weights)
            for ids in weighted([ids for ids in train if dataset[ids[0]] == number], weight, params.split_seed)
        ]
    return {"train": train, "validation": [ids for ids in selection.threads if ids[0] in held]}
