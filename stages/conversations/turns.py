"""Turns as people write them -> the turns of a conversation: role, text, and whether an answer is trained on.

What a turn or a row holds besides text (tool calls, images, …) is refused by name, never ignored.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from stages.conversations.files import Row


class Turn(NamedTuple):
    """A turn. `role` is user, assistant or system, or what stands in the row where it is none of them."""

    role: Any
    text: Any  # a string, or what stands in the row instead of one
    trained: bool = True
    system: Any = None  # the system message that stands before it (None: none), or what stands in the row instead


class RefusedRow(Exception):
    """A row that would lose a part of its meaning. `reason` is its name in the funnel."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason = reason


UNSUPPORTED, LATE_SYSTEM = "unsupported", "late_system"  # reasons to refuse a row
GREETING, SYSTEM_AT_END = "greeting", "system_at_end"  # reasons to leave out a turn
BLANK_LINE = "\n\n"
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
TOOL_ROLES = {
    *("tool", "tool_call", "tool_calls", "tool_response", "tool_result"),
    *("function", "function_call", "function_response", "observation", "ipython"),
}
# Columns of a row, and fields of a turn, that change what a text means.
UNSUPPORTED_FIELDS = {
    **dict.fromkeys(("tool_calls", "tool_call", "function_call"), "tool calls"),
    **dict.fromkeys(("tools", "functions"), "tools"),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "reasoning"),
    **dict.fromkeys(("image", "images"), "images"),
    **dict.fromkeys(("audio", "audios"), "audio"),
    **dict.fromkeys(("video", "videos"), "videos"),
    "train_detail": "training on a part of a turn",
}
ROLE_FIELDS, TEXT_FIELDS = ("role", "from"), ("content", "value", "text")
YES_NO: dict[Any, bool] = {0: False, 1: True, **dict.fromkeys(("0", "0.0", "false"), False)}
YES_NO.update(dict.fromkeys(("1", "1.0", "true"), True))
SWITCHES = ("train", "training", "loss")  # false: the turn is context
TURN_FIELDS = {*ROLE_FIELDS, *TEXT_FIELDS, *SWITCHES, *UNSUPPORTED_FIELDS, "weight", "tool_call_id"}
TEXT_PARTS = ("text", "input_text", "output_text")
NOTHING = ("", "[]", "{}", "null")


def given(value: Any) -> bool:
    """Whether a field holds anything: parquet and CSV have every column in every row."""
    if isinstance(value, str):
        return value.strip() not in NOTHING
    return value is not None and value is not False and value != [] and value != {} and value == value


def from_json(value: Any) -> Any:
    """A list that is written as a JSON string, as a list; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def is_list(value: Any) -> bool:
    """Whether a value is a list, or a JSON string of one."""
    return isinstance(from_json(value), list)


def is_turns(value: Any) -> bool:
    """Whether a value is a list of role/content turns, or a JSON string of one."""
    listed = from_json(value)
    return bool(listed) and isinstance(listed, list) and all(_has_role(turn) for turn in listed)


def as_object_turn(value: Any) -> Row | None:
    """A single turn with a role, or a JSON string of one, as an object; None where the value is something else."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if _has_role(value) and first_given(value, TEXT_FIELDS) is not None else None


def _has_role(turn: Any) -> bool:
    role = first_given(turn, ROLE_FIELDS) if isinstance(turn, dict) else None
    return isinstance(role, str) and role.strip().lower() in {*ROLES, *TOOL_ROLES}


def refuse_unsupported(fields: Row, place: str) -> None:
    """Raise RefusedRow when a row or a turn holds a field of UNSUPPORTED_FIELDS; `place` says where it stands."""
    for name, what in UNSUPPORTED_FIELDS.items():
        if name in fields and given(fields[name]):
            raise RefusedRow(UNSUPPORTED, f"{what} (`{name}`{place}) cannot be trained on")


def yes_or_no(value: Any) -> bool | None:
    """What a value of YES_NO says; None for another one."""
    return YES_NO.get(
        value.strip().lower() if isinstance(value, str) else value if isinstance(value, int | float) else ""
    )


def is_trained(fields: Row, default: bool, place: str, names: Sequence[str] = ("weight", *SWITCHES)) -> bool:
    """Whether the fields `names` of a row or a turn let its answer be trained on; `default` where it has none of them.

    Raises RefusedRow for a value that is neither yes nor no, such as a weight of 0.5.
    """
    stated = []
    for name in names:
        value = fields.get(name)
        if value is None or value != value:
            continue
        stated.append(yes_or_no(value))
        if stated[-1] is None:
            raise RefusedRow(UNSUPPORTED, f"`{name}`{place} is {ascii(value)[:40]}; only 0 and 1 can be trained on")
    return all(stated) if stated else default


def text_of(content: Any, place: str) -> Any:
    """The text of a content: its parts of type text, one after the other. Raises RefusedRow for other parts."""
    if not isinstance(content, list) or not all(isinstance(part, dict) and "type" in part for part in content):
        return content
    for part in content:
        if part["type"] not in TEXT_PARTS:
            raise RefusedRow(UNSUPPORTED, f"a part of type {ascii(part['type'])[:40]}{place} cannot be trained on")
    texts = [part.get("text") for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content


def first_given(turn: Row, names: tuple[str, ...]) -> Any:
    """The first of a turn's fields that is not null."""
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def turn_of(turn: Any, number: int, default: bool = True) -> Turn:
    """One turn of a list; what is no object becomes a turn without role and text, which is counted as a bad row.

    Raises RefusedRow when the turn holds more than text.
    """
    if not isinstance(turn, dict):
        return Turn(None, None)
    place = f" of turn {number}"
    refuse_unsupported(turn, place)
    role = first_given(turn, ROLE_FIELDS)
    name = role.strip().lower() if isinstance(role, str) else None
    if name in TOOL_ROLES:
        raise RefusedRow(UNSUPPORTED, f"tool calls (role `{name}`{place}) cannot be trained on")
    text = text_of(first_given(turn, TEXT_FIELDS), place)
    return Turn(ROLES.get(name or "", role), text, is_trained(turn, default, place))


def turns_of(turns: Any, default: bool = True) -> list[Turn]:
    """The turns of a list, which may be a JSON string; one turn without role and text where there is none."""
    listed = from_json(turns)
    return [turn_of(turn, number, default) for number, turn in enumerate(listed, 1)] or [Turn(None, None)]


def fold_system(turns: list[Turn], own: Any) -> tuple[list[Turn], list[Turn]]:
    """The turns of user and assistant, each with the system turns before it, and the system turns behind the last.

    Before the first turn stands the row's `own` system message. Several system turns are joined by a blank line.
    """
    waiting = [] if own is None else [Turn("system", own)]
    folded: list[Turn] = []
    for turn in turns:
        if turn.role == "system":
            waiting.append(turn)
        else:
            folded.append(turn._replace(system=joined_system([each.text for each in waiting])))
            waiting = []
    return folded, waiting


def unfolded(turns: list[Turn]) -> list[Turn]:
    """The turns with the system messages before them as turns again."""
    systems = [[] if turn.system is None else [Turn("system", turn.system)] for turn in turns]
    return [each for before, turn in zip(systems, turns, strict=True) for each in (*before, turn._replace(system=None))]


def joined_system(texts: list[Any]) -> Any:
    """System messages as one, each text once; None where there is none, the list itself where one is no text."""
    texts = [text for text in texts if text is not None]
    if not all(isinstance(text, str) for text in texts):
        return texts
    return joined_text(list(dict.fromkeys(texts))) if texts else None


def joined_text(texts: list[str]) -> str:
    """Texts joined by a blank line; those without content are left out."""
    return BLANK_LINE.join(text for text in texts if text.strip())


def without_greeting(turns: list[Turn]) -> tuple[list[Turn], list[Turn]]:
    """The assistant's turns before the first question, and the others. A system message before them stays."""
    count = next((i for i, turn in enumerate(turns) if turn.role != "assistant"), len(turns))
    greeting, others = turns[:count], turns[count:]
    systems = [turn.system for turn in (*greeting, *others[:1]) if turn.system is not None]
    if greeting and others and systems:
        others = [others[0]._replace(system=joined_system(systems)), *others[1:]]
    return greeting, others


def alternating(turns: list[Turn]) -> Iterator[Turn]:
    """The turns, each run of turns of the same role joined by a blank line.

    Raises RefusedRow where a system turn stands in a run, or where only a part of a joined answer is to be trained on.
    """
    run: list[Turn] = []
    for turn in turns:
        if run and (turn.role != run[0].role or not isinstance(turn.text, str) or not isinstance(run[0].text, str)):
            yield _join(run)
            run = []
        run.append(turn)
    if run:
        yield _join(run)


def _join(run: list[Turn]) -> Turn:
    if len(run) == 1:
        return run[0]
    if any(turn.system is not None for turn in run[1:]):
        raise RefusedRow(LATE_SYSTEM, f"a system turn stands between two turns of the {run[0].role} in a row")
    if run[0].role == "assistant" and len({turn.trained for turn in run}) > 1:
        raise RefusedRow(
            UNSUPPORTED, "assistant turns in a row of which only some are trained (`weight`) are no answer"
        )
    return run[0]._replace(text=joined_text([turn.text for turn in run]))
