"""Rows in any form -> message rows. A form is an entry of FORMS: how a row is recognised and how it becomes messages.

A message row has OASST1's columns (message_id, parent_id, message_tree_id, text, role, …; see `message_row`), and
`system`, its conversation's own system message, on the first message. Roles are still the form's own names.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from stages.conversations.files import Row


class Form(NamedTuple):
    """A form of rows."""

    name: str
    roles: dict[str, str]  # the form's names of the two speakers -> user, assistant; the usual name of each first
    matches: Callable[[Row], bool]
    messages: Callable[[Row, str], Iterable[Row]]  # a row, and the id of its conversation where it states none


OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
TURN_ROLES = {"user": "user", "assistant": "assistant", "human": "user", "prompter": "user", "gpt": "assistant"}
# What instruction data sets call their two columns.
INSTRUCTION_COLUMNS = (
    ("instruction", "response"),
    ("instruction", "output"),
    ("prompt", "response"),
    ("prompt", "completion"),
)


def form_of(row: Row) -> Form:
    """The first form that a row matches; the last one matches every row."""
    return next(form for form in FORMS if form.matches(row))


# Nested trees ----------------------------------------------------------------------------------------------------


def tree_messages(row: Row, conversation_id: str) -> Iterator[Row]:
    """The messages of a nested tree, parents before their replies."""
    tree = {"message_tree_id": row.get("message_tree_id"), "tree_state": row.get("tree_state")}
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
        yield {**message, **tree}


# Conversations ---------------------------------------------------------------------------------------------------


def turn_messages(row: Row, conversation_id: str) -> Iterator[Row]:
    """The messages of a list of role/content turns."""
    # An empty conversation, and a turn that is no object, become an empty row, which is counted as a bad one.
    turns = [turn if isinstance(turn, dict) else {} for turn in row["messages"]] or [{}]
    return chain(turns, conversation_id, row)


def instruction_columns(row: Row) -> tuple[str, str] | None:
    """The two columns of an instruction row, or None."""
    if "message_id" in row:
        return None
    return next((columns for columns in INSTRUCTION_COLUMNS if columns[0] in row and columns[1] in row), None)


def instruction_messages(row: Row, conversation_id: str) -> Iterator[Row]:
    """The question and the answer of an instruction row; `input`, if there is any, is part of the question."""
    columns = instruction_columns(row)
    assert columns is not None
    question, answer = (row[name] for name in columns)
    context = row.get("input")
    if isinstance(question, str) and isinstance(context, str) and context.strip():
        question = f"{question}\n\n{context}"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return chain(turns, conversation_id, row)


def chain(turns: list[Row], conversation_id: str, row: Row) -> Iterator[Row]:
    """Role/content turns as message rows, each the reply to the one before; the first carries the system message."""
    shared: Row = {key: row[key] for key in ("lang", "synthetic", "deleted", "detoxify", "labels") if key in row}
    system: Any = next((turn.get("content") for turn in turns if turn.get("role") == "system"), None)
    parent = None
    for i, turn in enumerate(turn for turn in turns if turn.get("role") != "system"):
        message_id = f"{conversation_id}.{i}"
        yield {
            **shared,
            "message_id": message_id,
            "parent_id": parent,
            "message_tree_id": conversation_id,
            "text": turn.get("content"),
            "role": turn.get("role"),
            "system": system if parent is None else None,
        }
        parent = message_id


# The registry ----------------------------------------------------------------------------------------------------

FORMS = (
    Form("nested tree", OASST_ROLES, lambda row: isinstance(row.get("prompt"), dict), tree_messages),
    Form("messages", TURN_ROLES, lambda row: isinstance(row.get("messages"), list), turn_messages),
    Form("instruction", TURN_ROLES, lambda row: instruction_columns(row) is not None, instruction_messages),
    Form("message", OASST_ROLES, lambda row: True, lambda row, conversation_id: [row]),
)
