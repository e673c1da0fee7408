"""Rows in any form -> message rows. A form is an entry of FORMS: its columns, and how a row becomes messages.

A message row has OASST1's columns (message_id, parent_id, message_tree_id, text, role, …; see `message_row`), and
`system`, the system message that stands right before it. Roles are still the form's own names.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from stages.conversations.files import Row
from stages.conversations.turns import (
    GREETING,
    SWITCHES,
    SYSTEM_AT_END,
    TURN_FIELDS,
    UNSUPPORTED_FIELDS,
    Turn,
    alternating,
    fold_system,
    from_json,
    given,
    is_list,
    is_trained,
    is_turns,
    refuse_unsupported,
    text_of,
    turns_of,
    without_greeting,
)

Columns = tuple[str, ...]


class Form(NamedTuple):
    """A form of rows."""

    name: str
    columns: tuple[Columns, ...]  # the sets of columns by which people write it; one of them is needed
    roles: dict[str, str]  # the form's names of the two speakers -> user, assistant
    matches: Callable[[Row], bool]
    messages: Callable[[Row, str], Iterable[Row]]  # a row, and the id of its conversation where it states none
    also: frozenset[str] = frozenset()  # columns that it reads besides those it needs
    is_tree: bool = False  # rows of OASST1's own schema, whose other columns are known


OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
TURN_ROLES = {"user": "user", "assistant": "assistant"}
# What instruction data sets call their two columns.
INSTRUCTION_COLUMNS: tuple[Columns, ...] = (
    ("instruction", "response"),
    ("instruction", "output"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("question", "response"),
    ("input", "output"),
)
QUESTIONS = ("prompt", "question", "instruction", "input")  # what stands before a chosen answer
CONTEXT = ("input", "context")  # appended to the question
SYSTEM = ("system", "system_prompt")
SHARED = ("lang", "synthetic", "deleted", "detoxify", "labels")  # columns that hold for all messages of a row
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


def turn_form(name: str, column: str) -> Form:
    """The form whose rows hold a list of turns in a column."""
    return Form(
        name,
        ((column,),),
        TURN_ROLES,
        lambda row: is_list(row.get(column)),
        lambda row, conversation_id: chain(turns_of(row[column], row_is_trained(row)), conversation_id, row),
    )


def chosen_columns(row: Row) -> Columns | None:
    """The columns of a preference row, or None."""
    if "message_id" in row or not given(row.get("chosen")):
        return None
    question = next((name for name in QUESTIONS if given(row.get(name))), None)
    if question is not None:
        return question, "chosen"
    return ("chosen",) if is_turns(row["chosen"]) else None


def chosen_messages(row: Row, conversation_id: str) -> Iterator[Row]:
    """The conversation with the chosen answer: a text, the turns after the prompt, or all turns."""
    *question, answer = chosen_columns(row) or ()
    turns = as_turns(row[answer], "assistant", row_is_trained(row))
    begins = next((turn.role for turn in turns if turn.role != "system"), None)
    if question and begins != "user":
        turns = as_turns(row[question[0]], "user", row_is_trained(row)) + turns
    return chain(turns, conversation_id, row)


def instruction_columns(row: Row) -> Columns | None:
    """The two columns of an instruction row, or None."""
    if "message_id" in row:
        return None
    found = [columns for columns in INSTRUCTION_COLUMNS if columns[0] in row and columns[1] in row]
    filled = (columns for columns in found if given(row[columns[0]]) and given(row[columns[1]]))
    return next(filled, found[0] if found else None)  # a table has the columns of other rows, too


def instruction_messages(row: Row, conversation_id: str) -> Iterator[Row]:
    """The history, the question and the answer of an instruction row; `input`, if any, is part of the question."""
    names = instruction_columns(row)
    assert names is not None
    question, answer = (row[name] for name in names)
    for name in CONTEXT:
        context = row.get(name) if name not in names else None
        if not is_turns(question) and isinstance(question, str) and isinstance(context, str) and context.strip():
            question = f"{question}\n\n{context}"
    trained = row_is_trained(row) and row.get("label") is not False  # TRL's unpaired preferences
    turns = as_turns(question, "user", trained) + as_turns(answer, "assistant", trained)
    # A system turn of the question stays in front of the history.
    leading = next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))
    return chain(turns[:leading] + history_turns(row, trained) + turns[leading:], conversation_id, row)


def history_turns(row: Row, trained: bool) -> list[Turn]:
    """The turns before a question: pairs of question and answer, or role/content turns."""
    history = from_json(row.get("history"))
    if not given(history):
        return []
    if not isinstance(history, list):
        return [Turn(None, history)]  # counted as a bad row
    turns: list[Turn] = []
    for number, pair in enumerate(history, 1):
        if isinstance(pair, list) and len(pair) == 2:
            turns += [Turn("user", pair[0]), Turn("assistant", pair[1], trained)]
        else:
            turns += turns_of([pair], trained) if isinstance(pair, dict) else [Turn(None, f"history {number}")]
    return turns


def as_turns(value: Any, role: str, trained: bool) -> list[Turn]:
    """A column as turns: a list of turns, or the text of one turn of a role."""
    if is_turns(value):
        return turns_of(value, trained)
    return [Turn(role, text_of(value, ""), trained)]


def row_is_trained(row: Row) -> bool:
    """Whether the answers of a row are trained on where their own turns do not say so."""
    return is_trained(row, True, "")


def chain(turns: list[Turn], conversation_id: str, row: Row) -> Iterator[Row]:
    """Turns as message rows, each the reply to the one before, with the system message that stands before it.

    An answer before the first question, and a system turn behind the last turn, are rows of their own with `left_out`.
    Raises RefusedRow for a row that would lose a part of its meaning.
    """
    refuse_unsupported(row, "")
    folded, at_end = fold_system(turns, next((row[name] for name in SYSTEM if given(row.get(name))), None))
    greeting, talk = without_greeting(folded)
    talk = list(alternating(talk))
    reasons = [GREETING] * len(greeting) + [None] * len(talk) + [SYSTEM_AT_END] * len(at_end)
    shared: Row = {key: row[key] for key in SHARED if key in row}
    parent = None
    for i, (turn, reason) in enumerate(zip([*greeting, *talk, *at_end], reasons, strict=True)):
        message_id = f"{conversation_id}.{i}"
        yield {
            **shared,
            "message_id": message_id,
            "parent_id": parent,
            "message_tree_id": conversation_id,
            "text": turn.text,
            "role": "user" if reason == SYSTEM_AT_END else turn.role,
            "system": turn.system,
            "trained": turn.trained,
            "left_out": reason,
        }
        parent = None if reason else message_id


def unread_columns(row: Row, form: Form) -> Iterator[str]:
    """The columns of a row, and the fields of its turns, that its form does not read."""
    if form.is_tree:
        for part in (row, *nodes(row)) if isinstance(row.get("prompt"), dict) else (row,):
            yield from (str(name) for name in part.keys() - TREE_COLUMNS if given(part[name]))
        return
    read = {name for columns in form.columns for name in columns} | form.also | COMMON
    yield from (str(name) for name, value in row.items() if name not in read and given(value))
    for column in read & row.keys():
        turns = row[column] if column not in COMMON else None
        if isinstance(turns, list):
            for turn in turns:
                if isinstance(turn, dict):
                    yield from (
                        f"{column}.{key}" for key, value in turn.items() if key not in TURN_FIELDS and given(value)
                    )


# The registry ----------------------------------------------------------------------------------------------------

FORMS = (
    Form(
        "nested tree",
        (("prompt",),),
        OASST_ROLES,
        lambda row: isinstance(row.get("prompt"), dict),
        tree_messages,
        is_tree=True,
    ),
    turn_form("messages", "messages"),
    turn_form("ShareGPT", "conversations"),
    turn_form("conversation", "conversation"),
    Form(
        "preference",
        (("prompt", "chosen"), ("question", "chosen"), ("instruction", "chosen"), ("input", "chosen"), ("chosen",)),
        TURN_ROLES,
        lambda row: chosen_columns(row) is not None,
        chosen_messages,
        also=frozenset({"rejected"}),
    ),
    Form(
        "instruction",
        INSTRUCTION_COLUMNS,
        TURN_ROLES,
        lambda row: instruction_columns(row) is not None,
        instruction_messages,
        also=frozenset({*CONTEXT, "history", "label"}),
    ),
    Form(
        "message",
        (("message_id", "text", "role"),),
        OASST_ROLES,
        lambda row: "message_id" in row or {"text", "role"} <= row.keys(),
        lambda row, conversation_id: [flat_message(row)],
        is_tree=True,
    ),
)
