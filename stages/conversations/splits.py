"""Which threads are held out for validation, and which are trained on, how often."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from stages.common.schema import PrepareParams
from stages.conversations.selection import Selection, Thread


def settle_splits(selection: Selection) -> Selection:
    """Settle the splits that a data set brings: its validation split is held out, or if it has none its test split.

    Rows outside these two splits are dropped (a test split beside a validation split stays unseen). Files without a
    split are trained on where a test split is the only one. Where a data set has no such pair of splits, `split`
    becomes None on all its rows. A test split is dropped where nothing else could be trained on.
    """
    messages = selection.messages
    settled = messages["split"].copy()
    for _, names in messages.groupby("dataset")["split"]:
        settled[names.index] = names.map(settled_names(set(names.dropna()), bool(names.isna().any())), na_action=None)
    selection = replace(selection, messages=messages.assign(split=settled.astype(object).where(settled.notna(), None)))
    return selection.keep(settled.ne("other"), "other_split")


def settled_names(found: set[str], unnamed: bool) -> dict[str | None, str | None]:
    """What becomes of each split of a data set; `unnamed` says whether some of its files state none.

    A split becomes train, validation, other (dropped) or None (by hash).
    """
    everything = (None, *found)
    if "train" in found:
        held = next((name for name in ("validation", "test") if name in found), None)
        if held is None:
            return dict.fromkeys(everything)
        return {**dict.fromkeys(everything, "other"), "train": "train", held: "validation"}
    if "test" not in found:
        return dict.fromkeys(everything)
    if "validation" in found:  # and files without a split, which are trained on
        return {None: "train", "validation": "validation" if unnamed else None, "test": "other"}
    return {None: "train", "test": "validation" if unnamed else "other"}


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
