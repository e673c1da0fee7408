"""Turn message trees and other rows into conversations: choose threads, filter, deduplicate, split.

Reads data/raw/1/, … (stages/conversations/files.py lists the types of files, forms.py the forms of rows).
Writes data/prepared/{train,validation}.parquet (a conversation a row), data/prepared/params.json (how they were chosen)
and reports/funnel.json (messages, trees, conversations and characters that each step dropped and kept, by reason and by
language). Run: `dvc repro prepare`
"""

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from stages.common.artifacts import write_json, write_whole
from stages.common.params import load_params
from stages.common.records import read_sources
from stages.common.schema import PrepareParams
from stages.conversations.files import data_files, name_in
from stages.conversations.filters import (
    ALTERNATING,
    FILTERS,
    LEAK,
    THREAD_FILTERS,
    VALID,
    keep_messages,
    keep_threads,
)
from stages.conversations.known import check_known
from stages.conversations.messages import check_bad_rows, check_unsupported, left_out_notes, read_messages
from stages.conversations.selection import Selection
from stages.conversations.splits import settle_splits, settled_splits, split_note, threads_by_split
from stages.conversations.tables import conversation_table, count_kept
from stages.conversations.threads import cut_threads, find_threads

RAW = Path("data/raw")
PREPARED = Path("data/prepared")
FUNNEL = Path("reports/funnel.json")


def prepare(messages: pd.DataFrame, params: PrepareParams) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """Messages (columns: see `read_messages`) to conversations by split (columns: see `conversation_table`), and the
    funnel: what was read, dropped by each step, and kept by split.

    Raises StageError when a row is unsupported, too many rows are bad, or nothing is left for a split.
    """
    check_unsupported(messages, params.unsupported_rows)
    check_bad_rows(messages["bad"], params.max_bad_rows, RAW)
    selection = keep_messages(Selection.of(messages), (*VALID, *FILTERS), params)
    selection = keep_messages(settle_splits(selection, settled_splits(messages)), ALTERNATING, params)
    selection = selection.with_threads(find_threads(selection.messages, params.threads), "other_thread")
    selection = selection.with_threads(cut_threads(selection.threads, params.max_turns), "beyond_max_turns")
    selection = keep_threads(selection, THREAD_FILTERS, params)
    splits = threads_by_split(selection, params)
    if params.dataset_weights is not None:
        used = {ids for threads in splits.values() for ids in threads}
        selection = selection.keep_threads([ids in used for ids in selection.threads], "below_weight")
    tables = {name: conversation_table(selection, threads, params.system_prompt) for name, threads in splits.items()}
    kept = {name: count_kept(selection.messages, table) for name, table in tables.items()}
    return tables, {"read": selection.funnel.read, "dropped": selection.funnel.dropped, "kept": kept}


def split_notes(messages: pd.DataFrame, datasets: int) -> list[str]:
    """Which file of each data set went where, a line a data set; none where no file states a split."""
    if messages["split"].isna().all():
        return []
    fates = settled_splits(messages)
    folders = [RAW / str(number + 1) for number in range(datasets)]
    files = [[name_in(file, folder) for file in data_files(folder)] for folder in folders]
    return [split_note(names, fates[number]) for number, names in enumerate(files)]


def leak_note(funnel: dict[str, Any]) -> str | None:
    """A warning when training conversations ask held-out questions, with their number."""
    leaked = funnel["dropped"][LEAK]["conversations"]
    if not leaked:
        return None
    return (
        f"prepare: {leaked} conversations to train on ask a held-out question (compared without case, white space and "
        f"Unicode form). They are left out ({LEAK})."
    )


def main() -> None:
    params = load_params(PrepareParams)
    tables = []
    sources = read_sources(RAW / "source.json")
    for number, source in enumerate(sources):
        notes: list[str] = []
        tables.append(read_messages(RAW / str(number + 1), number, notes))
        check_unsupported(tables[-1], params.unsupported_rows)  # before a note says that they are left out
        for note in [*notes, *left_out_notes(tables[-1])]:
            print(f"prepare: {source['source']}: {note}", flush=True)
        trees = tables[-1]["message_tree_id"].nunique()
        if warning := check_known(source["source"], source["revision"], len(tables[-1]), trees):
            print(warning, file=sys.stderr, flush=True)
    messages = pd.concat(tables, ignore_index=True)
    for number, note in enumerate(split_notes(messages, len(sources))):
        print(f"prepare: {sources[number]['source']}: {note}", flush=True)
    splits, funnel = prepare(messages, params)
    if leak := leak_note(funnel):
        print(leak, file=sys.stderr, flush=True)
    with write_whole(FUNNEL) as report, write_whole(PREPARED) as folder:
        write_json(report, funnel)
        folder.mkdir()
        for name, conversations in splits.items():
            conversations.to_parquet(folder / f"{name}.parquet", index=False)
        write_json(folder / "params.json", params.model_dump())
    kept = ", ".join(f"{len(c)} for {name}" for name, c in splits.items())
    print(f"prepare: {funnel['read']['messages']} messages in {funnel['read']['trees']} trees -> conversations: {kept}")
