"""Message rows -> the table of messages: their fields, checked, with the roles `user` and `assistant`."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from stages.common.errors import StageError
from stages.conversations.files import Row, data_files, format_of, name_in, read_rows, split_of
from stages.conversations.forms import OASST_ROLES, form_of, unknown_form, unread_columns
from stages.conversations.turns import GREETING, SYSTEM_AT_END, UNSUPPORTED, RefusedRow

# The fields without which a row is no message; every other field may be missing.
REQUIRED = ("message_id", "text", "role")
IDS = ("message_id", "parent_id", "message_tree_id")
UNKNOWN = "unknown"  # the language of a row that states none
MAX_NUMBER = 1e300  # Python's integers may be too large for a float
MAX_SHOWN = 40  # characters of a value in an error line
MAX_LISTED = 20  # columns in a line
TURNS_LEFT_OUT = {GREETING: "begin with an answer", SYSTEM_AT_END: "end with a system message"}


def read_messages(folder: Path, dataset: int = 0, notes: list[str] | None = None) -> pd.DataFrame:
    """The messages of the data files in `folder`, in the order of file names and rows.

    Columns: those of `message_row`, and dataset (as given: 0, 1, …). The ids of a second data set start with `2/`, and
    so on: two data sets may use the same ids for different messages. What a user should know is appended to `notes`.
    Raises StageError when there is no data file, one cannot be read, or they hold no rows.
    """
    files = data_files(folder)
    unread: Counter[str] = Counter()
    stems = Counter(stem_of(file, folder) for file in files)
    rows: list[Row] = []
    for file in files:
        name, stem = name_in(file, folder), stem_of(file, folder)
        rows += messages_of(file, name, stem if stems[stem] == 1 else name, unread)
    if not rows:
        raise StageError(f"{folder}: the data files hold no rows. Check `dataset` in params.yaml.")
    if notes is not None and unread:
        listed = ", ".join(f"{ascii(name)[1:-1]} ({count} rows)" for name, count in unread.most_common(MAX_LISTED))
        notes.append(f"columns that are not read: {listed}{', …' * (len(unread) > MAX_LISTED)}")
    table = pd.DataFrame(rows).astype({"rank": "Float64", "quality": "Float64", "toxicity": "Float64"})
    if dataset:
        for name in IDS:
            table[name] = [f"{dataset + 1}/{text}" if isinstance(text, str) else text for text in table[name]]
    return table.assign(dataset=dataset)


def stem_of(file: Path, folder: Path) -> str:
    """A data file's path inside its folder, without its ending."""
    return name_in(file, folder).removesuffix(format_of(file).ending)


def messages_of(file: Path, name: str, prefix: str, unread: Counter[str]) -> Iterator[Row]:
    """The messages of a data file; a row that cannot be read is an empty message whose `bad` says why, one that is
    refused has `left_out` and `why`. The columns that are not read are counted in `unread`, by rows.

    `name` is the file in error lines; the ids of conversations without one begin with `prefix`.
    """
    split, place = split_of(name), format_of(file).place
    for number, row in read_rows(file, name):
        where, conversation_id = f"{name} {place} {number}", f"{prefix}-{number}"
        if isinstance(row, str):
            yield {**message_row({}, split=split), "bad": f"{where}: {row}"}
            continue
        form = form_of(row)
        if form is None:
            yield {**message_row({}, split=split), "bad": f"{where}: {unknown_form(row)}"}
            continue
        try:
            messages = list(form.messages(row, conversation_id))
        except RefusedRow as refused:
            tree = {"message_id": f"{conversation_id}.0", "message_tree_id": conversation_id, "lang": row.get("lang")}
            empty = message_row({**tree, "text": "", "role": "prompter"}, split=split)
            yield {**empty, "bad": None, "left_out": refused.reason, "why": f"{where}: {refused}"}
            continue
        unread.update(set(unread_columns(row, form)))
        for message in messages:
            yield message_row(message, form.roles, split, where)


def message_row(row: Row, roles: dict[str, str] = OASST_ROLES, split: str | None = None, where: str = "a row") -> Row:
    """A row of the table of messages; a missing value is None.

    Columns: message_id, parent_id, message_tree_id, tree_state, text, role (user or assistant), lang, rank, deleted,
    synthetic, review_result, quality (0 to 1), toxicity (0 to 1), system (the system message that stands before it),
    trained (False: context only), left_out (the reason why a message of a readable row is left out, or None), why
    (where a refused row stands and why it is refused), split (as given: that of the file), bad (where the row stands
    and why it is no message; None if it is one).
    """
    message_id, detoxify = _typed(row, "message_id", str), row.get("detoxify")
    fields = {
        "message_id": message_id,
        "parent_id": _typed(row, "parent_id", str),
        "message_tree_id": _typed(row, "message_tree_id", str, message_id),
        "tree_state": _typed(row, "tree_state", str),
        "text": _typed(row, "text", str),
        "role": _typed(row, "role", str),
        "lang": _typed(row, "lang", str) or UNKNOWN,
        "rank": _number(row.get("rank")),
        "deleted": _typed(row, "deleted", bool, False),
        "synthetic": _typed(row, "synthetic", bool, False),
        "review_result": _typed(row, "review_result", bool),
        "quality": _number(_quality(row.get("labels"))),
        "toxicity": _number(detoxify.get("toxicity")) if isinstance(detoxify, dict) else None,
        "system": _typed(row, "system", str),
        "trained": _typed(row, "trained", bool, True),
        "left_out": _typed(row, "left_out", str),
        "why": None,
        "split": split,
    }
    problem = bad_field(row, fields, roles)
    fields["role"] = roles.get(fields["role"])
    if problem:
        # pyarrow cannot store invalid Unicode.
        fields = {name: None if text_problem(value) else value for name, value in fields.items()}
        fields["lang"] = fields["lang"] or UNKNOWN
    return {**fields, "bad": f"{where}: {problem}" if problem else None}


def _typed(row: Row, name: str, kind: type, default: Any = None) -> Any:
    value = row.get(name)
    return value if isinstance(value, kind) else default


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and abs(value) < MAX_NUMBER else None


def _quality(labels: Any) -> Any:
    """The value of the label `quality`, as the nested export ({quality: {value, count}}) or flat rows have it."""
    if not isinstance(labels, dict):
        return None
    if isinstance(labels.get("quality"), dict):
        return labels["quality"].get("value")
    names, values = labels.get("name"), labels.get("value")
    if isinstance(names, list) and isinstance(values, list):
        return next((value for name, value in zip(names, values, strict=False) if name == "quality"), None)
    return None


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


def shown(value: Any) -> str:
    """A value as an error line shows it: its beginning, in printable characters."""
    return ascii(value)[:MAX_SHOWN]


def check_bad_rows(bad: pd.Series, max_bad_rows: float, folder: Path) -> None:
    """Raise StageError, with the first problem, when more than a share `max_bad_rows` of the rows are not messages.

    `bad` is the column of that name; `folder` is named in the error.
    """
    found = bad.dropna()
    if len(found) > max_bad_rows * len(bad):
        raise StageError(
            f"{folder}: {len(found)} of {len(bad)} rows are not messages, more than max_bad_rows, {max_bad_rows}. "
            f"The first: {found.iloc[0]}. Fix the data, or raise max_bad_rows to skip such rows."
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
