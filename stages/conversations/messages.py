"""Message rows -> the table of messages: their fields, checked, with the roles `user` and `assistant`."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from stages.common.errors import StageError
from stages.conversations.fields import as_flag, as_number, quality_of, read_field, shown, toxicity_of
from stages.conversations.files import (
    Row,
    data_files,
    format_of,
    known_as,
    name_in,
    read_rows,
    split_of,
    unread_files,
)
from stages.conversations.forms import OASST_ROLES, form_of, unknown_form, unread_columns
from stages.conversations.turns import GREETING, SYSTEM_AT_END, UNSUPPORTED, RefusedRow

# The fields without which a row is no message; every other field may be missing.
REQUIRED = ("message_id", "text", "role")
IDS = ("message_id", "parent_id", "message_tree_id")
UNKNOWN = "unknown"  # the language of a row that states none
MAX_LISTED = 20  # columns or files in a line
TURNS_LEFT_OUT = {GREETING: "begin with an answer", SYSTEM_AT_END: "end with a system message"}


@dataclass
class Counts:
    """What is counted while rows are read: all, those of each form, and those with each column that is not read.
    `files` are the files that are not read."""

    rows: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    files: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """What a user should know of it, one line each."""
        notes = []
        if self.files:
            listed = ", ".join(ascii(name)[1:-1] for name in self.files[:MAX_LISTED])
            notes.append(f"files that are not read: {listed}{', …' * (len(self.files) > MAX_LISTED)}")
        if self.unread:
            most = self.unread.most_common(MAX_LISTED)
            listed = ", ".join(f"{ascii(name)[1:-1]} ({count} rows)" for name, count in most)
            notes.append(f"columns that are not read: {listed}{', …' * (len(self.unread) > MAX_LISTED)}")
        return notes


def read_messages(
    folder: Path, dataset: int = 0, counts: Counts | None = None, source: str | None = None
) -> pd.DataFrame:
    """The messages of the data files in `folder`, in the order of file names and rows.

    Columns: those of `message_row`, row (the number of its row in the data set), and dataset (as given: 0, 1, …). The
    ids of a second data set start with `2/`, and so on: two data sets may use the same ids for different messages.
    Error lines name files as the user does who wrote `source`. Raises StageError when there is no data file, one cannot
    be read, or they hold no rows.
    """
    files = data_files(folder, source)
    counts = counts or Counts()
    counts.files += [name_in(file, folder) for file in unread_files(folder)]
    stems = Counter(stem_of(file, folder) for file in files)
    rows: list[Row] = []
    for file in files:
        name, stem = name_in(file, folder), stem_of(file, folder)
        prefix = stem if stems[stem] == 1 else name
        rows += messages_of(file, Place(known_as(name, source), format_of(file).place, split_of(name), prefix), counts)
    if not rows:
        raise StageError(f"{source or folder}: the data files hold no rows. Check `dataset` in params.yaml.")
    table = pd.DataFrame(rows).astype({"rank": "Float64", "quality": "Float64", "toxicity": "Float64"})
    if dataset:
        for name in IDS:
            table[name] = [f"{dataset + 1}/{text}" if isinstance(text, str) else text for text in table[name]]
    return table.assign(dataset=dataset)


def stem_of(file: Path, folder: Path) -> str:
    """A data file's path inside its folder, without its ending."""
    return name_in(file, folder)[: -len(format_of(file).ending)]


class Place(NamedTuple):
    """What a data file gives its messages."""

    name: str  # the file in error lines
    kind: str  # what a row is called there
    split: str | None
    prefix: str  # of the ids of conversations that have none


def messages_of(file: Path, place: Place, counts: Counts) -> Iterator[Row]:
    """The messages of a data file, each with the number of its row."""
    for number, row in read_rows(file, place.name):
        counts.rows += 1
        for message in row_messages(row, number, place, counts):
            message["row"] = counts.rows
            yield message


def row_messages(row: Row | str, number: int, place: Place, counts: Counts) -> list[Row]:
    """The messages of a row; a row that cannot be read is an empty message whose `bad` says why, one that is refused
    has `left_out` and `why`."""
    where, conversation_id = f"{place.name} {place.kind} {number}", f"{place.prefix}-{number}"
    form = None if isinstance(row, str) else form_of(row)
    if isinstance(row, str) or form is None:
        problem = row if isinstance(row, str) else unknown_form(row)
        return [{**message_row({}, split=place.split), "bad": f"{where}: {problem}"}]
    counts.forms[form.name] += 1
    try:
        messages = list(form.messages(row, conversation_id))
    except RefusedRow as refused:
        tree = {"message_id": f"{conversation_id}.0", "message_tree_id": conversation_id, "lang": row.get("lang")}
        empty = message_row({**tree, "text": "", "role": "prompter"}, split=place.split)
        return [{**empty, "bad": None, "left_out": refused.reason, "why": f"{where}: {refused}"}]
    counts.unread.update(set(unread_columns(row, form)))
    return [message_row(message, form.roles, place.split, where) for message in messages]


def message_row(row: Row, roles: dict[str, str] = OASST_ROLES, split: str | None = None, where: str = "a row") -> Row:
    """A row of the table of messages; a missing value is None.

    Columns: message_id, parent_id, message_tree_id, tree_state, text, role (user or assistant), lang, rank, deleted,
    synthetic, review_result, quality (0 to 1), toxicity (0 to 1), system (the system message that stands before it),
    trained (False: context only), left_out (the reason why a message of a readable row is left out, or None), why
    (where a refused row stands and why it is refused), split (as given: that of the file), bad (where the row stands
    and why it is no message; None if it is one).
    """
    message_id, problems = _typed(row, "message_id", str), list[str]()
    fields = {
        "message_id": message_id,
        "parent_id": _typed(row, "parent_id", str),
        "message_tree_id": _typed(row, "message_tree_id", str, message_id),
        "tree_state": _typed(row, "tree_state", str),
        "text": _typed(row, "text", str),
        "role": _typed(row, "role", str),
        "lang": _typed(row, "lang", str) or UNKNOWN,
        "rank": read_field(row, "rank", as_number, problems),
        "deleted": read_field(row, "deleted", as_flag, problems, False),
        "synthetic": read_field(row, "synthetic", as_flag, problems, False),
        "review_result": read_field(row, "review_result", as_flag, problems),
        "quality": read_field(row, "labels", quality_of, problems),
        "toxicity": read_field(row, "detoxify", toxicity_of, problems),
        "system": _typed(row, "system", str),
        "trained": _typed(row, "trained", bool, True),
        "left_out": _typed(row, "left_out", str),
        "why": None,
        "split": split,
    }
    problem = bad_field(row, fields, roles) or next(iter(problems), None)
    fields["role"] = roles.get(fields["role"])
    if problem:
        # pyarrow cannot store invalid Unicode.
        fields = {name: None if text_problem(value) else value for name, value in fields.items()}
        fields["lang"] = fields["lang"] or UNKNOWN
    return {**fields, "bad": f"{where}: {problem}" if problem else None}


def _typed(row: Row, name: str, kind: type, default: Any = None) -> Any:
    value = row.get(name)
    return value if isinstance(value, kind) else default


def bad_field(row: Row, fields: Row, roles: dict[str, str]) -> str | None:
    """Why a row is no message: a field is missing or has a wrong type, the role is unknown, or a text is invalid."""
    for name in REQUIRED:
        if fields[name] is None:
            return f"{name} is missing" if row.get(name) is None else f"{name} is {shown(row[name])}, not a string"
    if fields["role"] not in roles:
        user, assistant = list(roles)[:2]
        return f"role is {shown(fields['role'])}, neither {user} nor {assistant}"
    parent = row.get("parent_id")
    # Parquet may hold NaN where there is no parent, and NaN is not equal to itself.
    if fields["parent_id"] is None and isinstance(parent, int | float | list | dict) and parent == parent:
        return f"parent_id is {shown(parent)}, not a string"
    if isinstance(row.get("system"), list | dict):
        return f"system is {shown(row['system'])}, not a string"
    return next((f"{name} holds {why}" for name, value in fields.items() if (why := text_problem(value))), None)


def text_problem(value: Any) -> str | None:
    """Why a text can be neither trained on nor written, or None."""
    if not isinstance(value, str):
        return None
    if "\0" in value:
        return "a NUL character"
    try:
        _ = value.isascii() or value.encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair"
    return None


def check_bad_rows(messages: pd.DataFrame, max_bad_rows: float, sources: Sequence[str]) -> None:
    """Raise StageError, with the first problem, when more than a share `max_bad_rows` of a data set's rows are not
    messages or conversations. `sources` are the data sets' names in the error."""
    for number, part in messages.groupby("dataset"):
        bad = part[part["bad"].notna()]
        rows, bad_rows = part["row"].nunique(), bad["row"].nunique()
        if bad_rows > max_bad_rows * rows:
            name = sources[number] if sources else "the data"
            raise StageError(
                f"{name}: {bad_rows} of {rows} rows cannot be used, more than max_bad_rows, {max_bad_rows}. "
                f"The first: {bad['bad'].iloc[0]}. Fix the data, or raise max_bad_rows to skip such rows."
            )


def check_unsupported(messages: pd.DataFrame, unsupported_rows: str) -> None:
    """Raise StageError, with the first of them, when rows are `unsupported` and they are to stop the run."""
    found = messages.loc[messages["left_out"] == UNSUPPORTED, "why"]
    if len(found) and unsupported_rows == "stop":
        raise StageError(
            f"{found.iloc[0]}. {len(found)} rows hold more than text. Take this out of the data, or set "
            "`unsupported_rows: skip` in params.yaml to leave such rows out."
        )


def left_out_notes(messages: pd.DataFrame) -> list[str]:
    """A line for each reason for which rows that can be read, or turns of them, are left out."""
    notes = []
    for reason, found in messages.groupby("left_out", sort=True):
        if reason in TURNS_LEFT_OUT:
            rows = found["message_tree_id"].nunique()
            notes.append(f"{rows} conversations {TURNS_LEFT_OUT[reason]}; it is left out ({reason})")
        else:
            notes.append(f"{len(found)} rows are left out ({reason}). The first: {found['why'].iloc[0]}")
    return notes
