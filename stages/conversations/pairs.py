"""Rows with a question or an answer in a column of its own -> turns -> message rows.

Instructions, preferences, and lists of turns whose answer stands beside them share these functions, so that each reads
the same columns: history, context, system messages. Each says which columns it read; prepare lists the others.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from stages.conversations.files import Row
from stages.conversations.turns import (
    BLANK_LINE,
    GREETING,
    SYSTEM_AT_END,
    Turn,
    alternating,
    as_object_turn,
    fold_system,
    from_json,
    given,
    is_trained,
    is_turns,
    joined_system,
    refuse_unsupported,
    text_of,
    turn_of,
    turns_of,
    unfolded,
    without_greeting,
)

Columns = tuple[str, ...]
# What instruction data sets call their two columns.
INSTRUCTION_COLUMNS: tuple[Columns, ...] = (
    ("instruction", "response"),
    ("instruction", "output"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("prompt", "output"),
    ("question", "answer"),
    ("question", "response"),
    ("question", "output"),
    ("input", "output"),
)
QUESTIONS = ("prompt", "question", "instruction", "input")  # what stands before a chosen answer
ANSWERS = ("chosen", "completion", "response")  # what stands behind a list of turns
CONTEXT = ("input", "context")  # appended to the question
SYSTEM = ("system", "system_prompt")
SHARED = ("lang", "synthetic", "deleted", "detoxify", "labels")  # columns that hold for all messages of a row


class Talk(NamedTuple):
    """The turns of a row, and the columns that they are from."""

    turns: list[Turn]
    columns: set[str]


# Columns -> turns ------------------------------------------------------------------------------------------------


def chosen_columns(row: Row) -> Columns | None:
    """The columns of a preference row, or None."""
    if "message_id" in row or not given(row.get("chosen")):
        return None
    question = next((name for name in QUESTIONS if given(row.get(name))), None)
    if question is not None:
        return question, "chosen"
    return ("chosen",) if is_turns(row["chosen"]) else None


def instruction_columns(row: Row) -> Columns | None:
    """The two columns of an instruction row, or None."""
    if "message_id" in row:
        return None
    found = [columns for columns in INSTRUCTION_COLUMNS if columns[0] in row and columns[1] in row]
    filled = (columns for columns in found if given(row[columns[0]]) and given(row[columns[1]]))
    return next(filled, found[0] if found else None)  # a table has the columns of other rows, too


def preference(row: Row) -> Talk:
    """The conversation with the chosen answer: a text, the turns after the prompt, or all turns."""
    *question, answer = chosen_columns(row) or ()
    if not question:
        return Talk(as_turns(row[answer], "assistant", row_is_trained(row)), {"chosen", "rejected"})
    return question_and_answer(row, question[0], answer)


def instruction(row: Row) -> Talk:
    """The history, the question and the answer of an instruction row."""
    question, answer = instruction_columns(row) or ()
    return question_and_answer(row, question, answer)


def listed(row: Row, column: str) -> Talk:
    """A list of turns. The answer to its last question may stand in a column beside it."""
    turns = turns_of(row[column], row_is_trained(row))
    answer = next((name for name in ANSWERS if given(row.get(name))), None)
    last = next((turn.role for turn in reversed(turns) if turn.role != "system"), None)
    if answer is None or last != "user":
        return Talk(turns, {column})
    trained = answer_is_trained(row, answer)
    turns = turns_of(row[column], trained)
    return _answered(turns, {column: turns}, row, answer, trained)


def question_and_answer(row: Row, question: str, answer: str) -> Talk:
    """The history, the question with its context, and the answer to it."""
    trained = answer_is_trained(row, answer)
    asked = as_turns(row[question], "user", trained)
    parts = {"history": history_turns(row, trained), question: asked}
    for name in CONTEXT:
        context = row.get(name) if name not in (question, answer) else None
        only = asked[0]
        if not is_turns(row[question]) and isinstance(only.text, str) and isinstance(context, str) and context.strip():
            parts[name] = [Turn("user", context)]
            asked = [only._replace(text=f"{only.text}{BLANK_LINE}{context}")]
    # A system turn of the question stays in front of the history.
    leading = next((i for i, turn in enumerate(asked) if turn.role != "system"), len(asked))
    return _answered(asked[:leading] + parts["history"] + asked[leading:], parts, row, answer, trained)


def _answered(before: list[Turn], parts: dict[str, list[Turn]], row: Row, answer: str, trained: bool) -> Talk:
    """Turns, and the answer to them. An answer that brings another conversation stands alone, with the system turns of
    the one before it; then only those columns of `parts` are read whose texts it repeats."""
    after = as_turns(row[answer], "assistant", trained)
    columns = {answer, "rejected"} if answer == "chosen" else {answer, "label"}
    if (turns := continued(before, after)) is not None:
        return Talk(turns, columns | parts.keys())
    said = " ".join(_words(turn.text) for turn in after)
    repeated = {name for name, part in parts.items() if all(_words(turn.text) in said for turn in _spoken(part))}
    return Talk([turn for turn in before if turn.role == "system"] + after, columns | repeated)


def continued(before: list[Turn], after: list[Turn]) -> list[Turn] | None:
    """`before`, then `after`. Where `after` repeats the last turns of `before`, they are said once, with the system
    turns of both. None where it begins with another question."""
    first, between = fold_system(before, None)
    then, at_end = fold_system(after, None)
    if not then or then[0].role != "user":
        return before + after
    for count in range(min(len(first), len(then)), 0, -1):
        pairs = list(zip(first[-count:], then[:count], strict=True))
        if all((a.role, _words(a.text)) == (b.role, _words(b.text)) for a, b in pairs):
            same = [
                b._replace(trained=a.trained and b.trained, system=joined_system([a.system, b.system]))
                for a, b in pairs
            ]
            return unfolded(first[:-count] + same) + between + unfolded(then[count:]) + at_end
    return None


def _spoken(turns: list[Turn]) -> list[Turn]:
    return [turn for turn in turns if turn.role != "system"]


def _words(text: Any) -> str:
    return " ".join(text.split()) if isinstance(text, str) else ascii(text)


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
    """A column as turns: a list of turns, one turn, or the text of one turn of a role."""
    if is_turns(value):
        return turns_of(value, trained)
    if (turn := as_object_turn(value)) is not None:
        return [turn_of(turn, 1, trained)]
    return [Turn(role, text_of(value, ""), trained)]


def row_is_trained(row: Row) -> bool:
    """Whether the answers of a row are trained on where their own turns do not say so."""
    return is_trained(row, True, "")


def answer_is_trained(row: Row, answer: str) -> bool:
    """The same for an answer in a column of its own: `label`, of TRL's unpaired preferences, may reject it. A chosen
    answer has no label."""
    return row_is_trained(row) and (answer == "chosen" or is_trained(row, True, "", ("label",)))


# Turns -> message rows -------------------------------------------------------------------------------------------


def chain(turns: list[Turn], conversation_id: str, row: Row) -> Iterator[Row]:
    """Turns as message rows, each the reply to the one before, with the system message that stands before it.

    An answer before the first question, and a system turn behind the last turn, are rows of their own with `left_out`.
    Raises RefusedRow for a row that would lose a part of its meaning.
    """
    refuse_unsupported(row, "")
    folded, at_end = fold_system(turns, joined_system([row[name] for name in SYSTEM if given(row.get(name))]))
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
