"""What prepare says of what it left out: the funnel as a short table, a warning for each step that took much, and why
nothing is left for a split."""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.common.errors import StageError
from stages.common.left_out import aligned, is_much, left_out_warning
from stages.conversations.filters import ALTERNATING, FILTERS, REPETITIONS, THREAD_FILTERS, VALID
from stages.conversations.selection import Selection, Thread

# The parameter that governs each step; the last ones are no filters, but choose threads.
PARAMETERS: dict[str, str | None] = {
    **{reason: parameter for reason, parameter, _ in (*VALID, *FILTERS, *ALTERNATING)},
    **{reason: parameter for reason, parameter, _ in (*THREAD_FILTERS, *REPETITIONS)},
    "other_split": None,
    "other_thread": "threads",
    "beyond_max_turns": "max_turns",
    "below_weight": "dataset_weights",
}


def left_out_table(funnel: Mapping[str, Any]) -> list[str]:
    """The lines of the table: what was read, dropped (most first) and kept. Steps that dropped nothing are left out."""
    read, kept = funnel["read"], funnel["kept"]
    rows: list[list[object]] = [["", "messages", "trees", "conversations"]]
    rows.append(["read", read["messages"], read["trees"], ""])
    dropped = [
        (reason, step) for reason, step in funnel["dropped"].items() if step["messages"] or step["conversations"]
    ]
    for reason, step in sorted(dropped, key=lambda pair: -pair[1]["messages"]):
        rows.append([f"dropped: {reason}", step["messages"], step["trees"], step["conversations"] or ""])
    for name, split in kept.items():
        rows.append([f"kept: {name}", split["messages"], split["trees"], split["conversations"]])
    return aligned(rows, "prepare")


def left_out_warnings(funnel: Mapping[str, Any]) -> list[str]:
    """A line for each step that took more than a tenth of the messages that were read, or of the conversations."""
    dropped, read = funnel["dropped"], funnel["read"]["messages"]
    found = sum(step["conversations"] for step in [*dropped.values(), *funnel["kept"].values()])
    lines = []
    for reason, step in sorted(dropped.items(), key=lambda pair: -pair[1]["messages"]):
        parameter = PARAMETERS[reason]
        if is_much(step["conversations"], found):
            lines.append(left_out_warning("prepare", reason, step["conversations"], found, parameter, "conversations"))
        elif is_much(step["messages"], read):
            lines.append(left_out_warning("prepare", reason, step["messages"], read, parameter))
    return lines


def check_left(splits: Mapping[str, Sequence[Thread]], selection: Selection) -> None:
    """Raise StageError when a split has no thread; it says why."""
    for name, threads in splits.items():
        if not threads:
            raise StageError(f"no conversation is left for {name}: {why_empty(name, selection)}")


def why_empty(split: str, selection: Selection) -> str:
    """What left a split without a conversation, and what to change: the step that dropped most messages.

    Where no step dropped more than half of them and no tree passed, the two largest steps.
    """
    read, dropped = selection.funnel.read, selection.funnel.dropped
    largest = sorted((name for name in dropped if dropped[name]["messages"]), key=lambda n: -dropped[n]["messages"])
    trees = len({ids[0] for ids in selection.threads})
    said = f"of {read['trees']} trees, {trees} passed all steps. "
    is_most = bool(largest) and dropped[largest[0]]["messages"] > read["messages"] / 2
    if is_most or (largest and not trees):
        named = largest[:1] if is_most else largest[:2]
        took = " and ".join(taken(name, dropped[name]) for name in named)
        return f"{said}Of {read['messages']} messages, {took}. {' '.join(map(change, named))}"
    held = dropped.get("question_is_held_out", {"conversations": 0})["conversations"]
    if split == "train" and held:
        return (
            f"{said}All others, {held} conversations, contain a question that is held out (`question_is_held_out`). "
            "Put other questions there."
        )
    return f"{said}One must be trained on and another, with another question, be held out. Put more data there."


def taken(reason: str, step: Mapping[str, Any]) -> str:
    """How many messages a step dropped, and in which languages where it filters by language."""
    languages = f" in {', '.join(step['by_language'])}" if reason == "language" else ""
    return f"{step['messages']}{languages} were dropped as `{reason}`"


def change(reason: str) -> str:
    """What to change so that a step drops less."""
    parameter = PARAMETERS[reason]
    return f"Change {parameter} in params.yaml." if parameter else f"docs/data.md explains `{reason}`."
