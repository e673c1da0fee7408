"""Show what training would make of a file or folder of conversations, and touch nothing of the run.

Reads the path, params.yaml, and the tokenizer of models/base/ if it is there; writes nothing. What it shows comes from
the functions of the prepare and tokenize stages. Run: `make check DATA=data/local/mine.jsonl`
"""

import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from stages.common.chat import Chat
from stages.common.downloads import is_watched, local_digest
from stages.common.errors import StageError
from stages.common.params import read_params, section_of
from stages.common.records import read_source
from stages.common.schema import Params, PrepareParams, TokenizeParams
from stages.common.truncation import cut_conversation
from stages.conversations.left_out import PARAMETERS as STEPS
from stages.conversations.messages import Counts, left_out_notes, read_messages
from stages.prepare import leak_note, prepare, split_notes
from stages.tokenize import PARAMETERS, encode, load_chat, take_late_system

BASE = Path("models/base")
SHOWN = 3  # conversations
MAX_RUN = 600  # characters of a text that are shown
MARKS = ("⟦", "⟧")
GREEN, PLAIN = "\033[1;32m", "\033[0m"
# How often so many conversations are usually trained on.
PASSES = ((2_000, 3), (20_000, 2))


@dataclass(frozen=True)
class Example:
    """A conversation as the model reads it: its runs of text, and whether each is trained on."""

    runs: list[tuple[str, bool]]
    tokens: int


@dataclass(frozen=True)
class Tokens:
    """What tokenize would make of all conversations."""

    lengths: list[int]  # tokens, before anything is cut
    kept: Counter[str]  # conversations by split
    trained: int  # tokens
    dropped: Counter[str]  # conversations
    answers_cut_off: int
    examples: list[Example]


# Reading ---------------------------------------------------------------------------------------------------------


def given_path(arguments: list[str]) -> Path:
    """The file or folder that is named on the command line."""
    if len(arguments) != 1 or not arguments[0]:
        raise StageError("name a file or folder: make check DATA=data/local/mine.jsonl")
    path = Path(arguments[0].removeprefix("file:")).expanduser()
    if not path.exists():
        raise StageError(f"{path} does not exist. Correct DATA=…")
    return path


def is_fetched(params: Params) -> bool:
    """Whether models/base/ is the base model of the parameters."""
    path = BASE / "source.json"
    if not path.is_file():
        return False
    record = read_source(path)
    return (record["source"], record["revision"]) == (params.base_model, params.base_model_revision)


@contextmanager
def as_folder(path: Path) -> Iterator[Path]:
    """A folder that holds a data file, as fetch makes it; a folder as it is."""
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="check-") as folder:
        (Path(folder) / path.name).symlink_to(path.resolve())
        yield Path(folder)


def in_order(splits: dict[str, pd.DataFrame], messages: pd.DataFrame) -> pd.DataFrame:
    """The conversations of all splits in the order of the data, with their split as a column."""
    place = {message_id: number for number, message_id in enumerate(messages["message_id"])}
    table = pd.concat([frame.assign(split=name) for name, frame in splits.items()], ignore_index=True)
    return table.loc[table["message_ids"].map(lambda ids: place[ids[0]]).sort_values(kind="stable").index]


def tokens_of(chat: Chat, decode: Any, conversations: pd.DataFrame, max_length: int, side: str) -> Tokens:
    """Conversations in tokens, as the tokenize stage counts, drops and cuts them. `decode`: token ids to text."""
    taken, late, _ = take_late_system(chat, conversations)
    dropped, kept = Counter(late_system=len(late)), Counter[str]()
    lengths: list[int] = []
    examples: list[Example] = []
    trained = cut_off = 0
    for row, encoded in encode(chat, taken):
        lengths.append(len(encoded.ids))
        cut = cut_conversation(chat, (row.messages, row.trained), encoded, max_length, side)
        if cut is None:
            dropped["too_long"] += 1
            continue
        kept[row.split] += 1
        trained += int(cut.mask.sum())
        cut_off += cut.lost
        if len(examples) < SHOWN:
            runs = groupby(zip(cut.ids, cut.mask.tolist(), strict=True), key=lambda pair: bool(pair[1]))
            examples.append(Example([(decode([i for i, _ in run]), mark) for mark, run in runs], len(cut.ids)))
    return Tokens(lengths, kept, trained, +dropped, cut_off, examples)


# Printing --------------------------------------------------------------------------------------------------------


def line(label: str, text: str) -> None:
    print(f"  {label:11} {text}")


def in_colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def marked(text: str) -> str:
    """A text that is trained on, in green or between marks."""
    return f"{GREEN}{text}{PLAIN}" if in_colour() else f"{MARKS[0]}{text}{MARKS[1]}"


def shortened(text: str) -> str:
    """A text, without its middle where it is long."""
    half = MAX_RUN // 2
    return text if len(text) <= MAX_RUN else f"{text[:half]} … ({len(text) - 2 * half} characters) … {text[-half:]}"


def percentiles(lengths: list[int]) -> str:
    series = pd.Series(lengths)
    return f"median {int(series.median())}, 95 % up to {int(series.quantile(0.95))}, longest {series.max()}"


def report_rows(counts: Counts, funnel: dict[str, Any], notes: list[str]) -> None:
    """What the data hold: forms, messages, languages, and what a user should know of them."""
    line("form", ", ".join(f"{name}: {number} rows" for name, number in counts.forms.most_common()))
    read = funnel["read"]
    line("read", f"{read['messages']} messages in {read['trees']} trees")
    languages = sorted(((v["trees"], k) for k, v in read["by_language"].items()), reverse=True)
    line("languages", ", ".join(f"{name} {number}" for number, name in languages))
    for note in notes:
        line("note", note)


def governed(reason: str) -> str:
    """A reason, and the parameter that governs it."""
    parameter = STEPS.get(reason) or PARAMETERS.get(reason)
    return f"{reason} (parameter {parameter})" if parameter else reason


def report_dropped(funnel: dict[str, Any], tokens: Tokens | None) -> None:
    """What prepare and tokenize would drop, by reason, the largest first."""
    reasons = [(step["messages"], step["conversations"], reason) for reason, step in funnel["dropped"].items()]
    for messages, conversations, reason in sorted(reasons, reverse=True):
        if messages or conversations:
            whole = f" ({conversations} conversations)" if conversations else ""
            line("dropped", f"{messages} messages{whole}: {governed(reason)}")
    if tokens:
        for reason, conversations in tokens.dropped.most_common():
            line("dropped", f"{conversations} conversations: {governed(reason)}")


def report_kept(kept: Mapping[str, int]) -> None:
    train, held = kept["train"], kept["validation"]
    line("kept", f"{train + held} conversations: {train} to train on, {held} held out ({held / (train + held):.1%})")


def report_tokens(tokens: Tokens | None, conversations: pd.DataFrame, max_length: int) -> None:
    """Lengths, and what max_length cuts; in characters where there is no tokenizer."""
    if tokens is None:
        characters = [sum(len(m["content"]) for m in messages) for messages in conversations["messages"]]
        line("lengths", f"characters: {percentiles(characters)}")
        line("", f"(`dvc repro fetch_model` gets {BASE}/, whose tokenizer counts tokens)")
        return
    line("lengths", f"tokens: {percentiles(tokens.lengths)}")
    beyond = sum(length > max_length for length in tokens.lengths)
    line("max_length", f"{max_length}: {beyond} conversations are longer and lose {tokens.answers_cut_off} answers")
    line("trained on", f"{tokens.trained} of {sum(tokens.lengths)} tokens")


def report_examples(tokens: Tokens | None, conversations: pd.DataFrame) -> None:
    """The first conversations, with what is trained on marked."""
    how = "in colour" if in_colour() else f"in {MARKS[0]}brackets{MARKS[1]}"
    print(f"\nThe first conversations, with what is trained on {how}:")
    examples = tokens.examples if tokens else [as_text(row) for row in conversations.head(SHOWN).itertuples()]
    for number, example in enumerate(examples, 1):
        size = f", {example.tokens} tokens" if example.tokens else ""
        print(f"\n  -- {number}{size}")
        text = "".join(marked(shortened(run)) if trained else shortened(run) for run, trained in example.runs)
        print("\n".join(f"  {each}" for each in text.rstrip("\n").split("\n")))


def as_text(row: Any) -> Example:
    """A conversation without a tokenizer: role and content of each message."""
    flags = iter(row.trained)
    runs = []
    for message in row.messages:
        runs.append((f"{message['role']}: ", False))
        runs.append((message["content"], bool(message["role"] == "assistant" and next(flags))))
        runs.append(("\n", False))
    return Example(runs, 0)


def steps_for(conversations: int, params: Params) -> tuple[int, int]:
    """A usual number of optimiser steps for so many conversations, and of passes over them."""
    passes = next((times for most, times in PASSES if conversations <= most), 1)
    batch = params.per_device_train_batch_size * params.gradient_accumulation_steps
    return max(1, math.ceil(passes * conversations / batch)), passes


def report_next(path: Path, conversations: int, params: Params) -> None:
    """The lines of params.yaml that train on the data."""
    steps, passes = steps_for(conversations, params)
    print(f"\nTo train on it, in params.yaml ({passes} {'pass' if passes == 1 else 'passes'} over what is kept):\n")
    inside = path.resolve().is_relative_to(Path.cwd().resolve())
    place = path.resolve().relative_to(Path.cwd().resolve()) if inside else path.resolve()
    revision = "" if is_watched(path, "dataset") else f" {local_digest(path)}"
    print(f"  dataset: file:{place}\n  dataset_revision:{revision}\n  max_steps: {steps}")
    for key in ("save_steps", "logging_steps"):
        if getattr(params, key) > steps:
            print(f"  {key}: {steps}")


def main() -> None:
    path, params = given_path(sys.argv[1:]), read_params()
    chosen = section_of(params.model_dump(), PrepareParams).model_copy(update={"dataset_weights": None})
    counts = Counts()
    with as_folder(path) as folder:
        messages = read_messages(folder, counts=counts, source=f"file:{path}")
        notes = [*counts.notes(), *left_out_notes(messages), *split_notes(messages, [folder])]
    print(f"{path}\n")
    splits, funnel = prepare(messages, chosen, [str(path)])
    if leak := leak_note(funnel):
        notes.append(leak.removeprefix("prepare: "))
    conversations = in_order(splits, messages)
    tokens = None
    if is_fetched(params):
        tokenizer, chat, _ = load_chat(section_of(params.model_dump(), TokenizeParams))
        tokens = tokens_of(chat, tokenizer.decode, conversations, params.max_length, params.truncation_side)
    report_rows(counts, funnel, notes)
    report_dropped(funnel, tokens)
    kept = tokens.kept if tokens else {name: counts["conversations"] for name, counts in funnel["kept"].items()}
    for split in ("train", "validation"):
        if not kept.get(split):
            raise StageError(f"no conversation of {split} is left, by what is dropped above. Change it as said there.")
    report_kept(kept)
    report_tokens(tokens, conversations, params.max_length)
    report_examples(tokens, conversations)
    report_next(path, kept["train"], params)
