"""Rows in any form -> message rows. A form is an entry of FORMS: its columns, and how a row becomes messages.

A message row has OASST1's columns (message_id, parent_id, message_tree_id, text, role, …; see `message_row`), and
`system`, the system message that stands right before it. Roles are still the form's own names.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from stages.conversations.files import Row
from stages.conversations.pairs import (
    INSTRUCTION_COLUMNS,
    SHARED,
    SYSTEM,
    Columns,
    Talk,
    chain,
    chosen_columns,
    instruction,
    instruction_columns,
    listed,
    preference,
    row_is_trained,
)
from stages.conversations.turns import SWITCHES, TURN_FIELDS, UNSUPPORTED_FIELDS, given, is_list, refuse_unsupported


class Form(NamedTuple):
    """A form of rows."""

    name: str
    columns: tuple[Columns, ...]  # the sets of columns by which people write it; one of them is needed
    roles: dict[str, str]  # the form's names of the two speakers -> user, assistant
    matches: Callable[[Row], bool]
    messages: Callable[[Row, str], Iterable[Row]]  # a row, and the id of its conversation where it states none
    talk: Callable[[Row], Talk] | None = None  # None: a message tree, of OASST1's own schema


OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
TURN_ROLES = {"user": "user", "assistant": "assistant"}
COMMON = {*SHARED, *SYSTEM, *SWITCHES, *UNSUPPORTED_FIELDS, "weight"}
# The columns of OASST1; some of them, such as user_id, say nothing of a conversation.
TREE_COLUMNS = {
    *("message_id", "parent_id", "message_tree_id", "tree_state", "text", "role", "rank", "review_count"),
    *("review_result", "user_id", "created_date", "model_name", "emojis", "prompt", "replies"),
    *COMMON.difference(SYSTEM),
    "system",
}


def form_of(row: Row) -> Form | None:
    """The first form that a row matches, or None."""
    return next((form for form in FORMS if form.matches(row)), None)


def unknown_form(row: Row) -> str:
    """Why a row has no form: its columns, the forms there are, and the nearest of them."""
    found = [str(name) for name in row]

    def likeness(columns: Columns) -> float:
        ratios = ([difflib.SequenceMatcher(None, c, name.lower()).ratio() for name in found] for c in columns)
        return sum(max(each, default=0.0) for each in ratios) / len(columns)

    name, columns = max(((f.name, c) for f in FORMS for c in f.columns), key=lambda pair: likeness(pair[1]))
    shown = ", ".join(found[:12]) or "none"
    missing = ", ".join(column for column in columns if column not in found)
    if not missing:  # the columns of turns, with something else in them
        missing = f"none, but {columns[0]} is {ascii(row[columns[0]])[:40]}, no list of turns and no JSON string of one"
    known = "; ".join(dict.fromkeys("/".join(c) for form in FORMS for c in form.columns))
    return (
        f"unknown form. Columns found: {ascii(shown)[1:-1][:200]}. Nearest form: {name} "
        f"({'/'.join(columns)}; missing: {missing}). Forms understood: {known}"
    )


# Nested trees ----------------------------------------------------------------------------------------------------


def nodes(row: Row) -> Iterator[Row]:
    """The objects of a nested tree, parents before their replies, which get their parent's id."""
    # An explicit stack: a tree may be deeper than Python recurses. The last reply is pushed first, so that replies are
    # popped in order.
    stack = [row["prompt"]]
    while stack:
        message = stack.pop()
        replies = message.get("replies")
        for reply in reversed(replies if isinstance(replies, list) else []):
            # A reply that is no object becomes an empty row, which is counted as a bad one.
            reply = reply if isinstance(reply, dict) else {}
            stack.append({"parent_id": message.get("message_id"), **reply})
        yield message


def tree_messages(row: Row, conversation_id: str) -> Iterator[Row]:
    """The messages of a nested tree, parents before their replies."""
    tree = {"message_tree_id": row.get("message_tree_id"), "tree_state": row.get("tree_state")}
    yield from ({**flat_message(message), **tree} for message in nodes(row))


def flat_message(row: Row) -> Row:
    """A message of a tree. Raises RefusedRow when it holds more than text."""
    refuse_unsupported(row, "")
    return {**row, "trained": row_is_trained(row)}


# Conversations ---------------------------------------------------------------------------------------------------


def talk_form(
    name: str, columns: tuple[Columns, ...], matches: Callable[[Row], bool], talk: Callable[[Row], Talk]
) -> Form:
    """A form whose rows are conversations; `talk` reads the turns of one."""

    def messages(row: Row, conversation_id: str) -> Iterator[Row]:
        return chain(talk(row).turns, conversation_id, row)

    return Form(name, columns, TURN_ROLES, matches, messages, talk)


def list_form(name: str, column: str) -> Form:
    """The form whose rows hold a list of turns in a column."""
    return talk_form(name, ((column,),), lambda row: is_list(row.get(column)), lambda row: listed(row, column))


def unread_columns(row: Row, form: Form) -> Iterator[str]:
    """The columns of a row, and the fields of its turns, that are not read from this row."""
    if form.talk is None:
        for part in (row, *nodes(row)) if isinstance(row.get("prompt"), dict) else (row,):
            yield from (str(name) for name in part.keys() - TREE_COLUMNS if given(part[name]))
        return
    read = form.talk(row).columns | COMMON
    yield from (str(name) for name, value in row.items() if name not in read and given(value))
    for column in read & row.keys():
        turns = row[column] if column not in COMMON else None
        for turn in turns if isinstance(turns, list) else [turns]:
            if isinstance(turn, dict):
                yield from (f"{column}.{key}" for key, value in turn.items() if key not in TURN_FIELDS and given(value))


# The registry ----------------------------------------------------------------------------------------------------

FORMS = (
    Form("nested tree", (("prompt",),), OASST_ROLES, lambda row: isinstance(row.get("prompt"), dict), tree_messages),
    list_form("messages", "messages"),
    list_form("ShareGPT", "conversations"),
    list_form("conversation", "conversation"),
    talk_form(
        "preference",
        (("prompt", "chosen"), ("question", "chosen"), ("instruction", "chosen"), ("input", "chosen"), ("chosen",)),
        lambda row: chosen_columns(row) is not None,
        preference,
    ),
    talk_form("instruction", INSTRUCTION_COLUMNS, lambda row: instruction_columns(row) is not None, instruction),
    Form(
        "message",
        (("message_id", "text", "role"),),
        OASST_ROLES,
        lambda row: "message_id" in row or {"text", "role"} <= row.keys(),
        lambda row, conversation_id: [flat_message(row)],
    ),
)
