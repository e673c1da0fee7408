"""A conversation as the page shows it: under each answer stands a line of figures, which the model does not read."""

from collections.abc import Sequence
from typing import Any

from progress import Progress

Shown = dict[str, Any]  # a message of gr.Chatbot: its role, and its content as a list of parts


def question(text: str) -> Shown:
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def answer(text: str, note: str) -> Shown:
    return {"role": "assistant", "content": [{"type": "text", "text": part} for part in (text, note)]}


def answer_so_far(state: Progress | str, before: Shown | None = None) -> Shown:
    """The answer, or (a line) what stands in its place or below what there was of it."""
    if isinstance(state, str):
        return answer(text_of(before) if before else "", state)
    return answer(state.text, figures(state))


def stopped(history: Sequence[Shown]) -> list[Shown]:
    """The conversation with its last answer marked as stopped."""
    if not history or history[-1]["role"] != "assistant":
        return list(history)
    text, note = (part["text"] for part in history[-1]["content"])
    return [*history[:-1], answer(text, f"{note} · stopped" if text else "stopped")]


def text_of(message: Shown) -> str:
    """What was said, without the note."""
    return str(message["content"][0]["text"])


def last_question(history: Sequence[Shown], index: Any) -> int:
    """Where the question stands that the message at `index` (from an event of gr.Chatbot) answers, or is."""
    return max(i for i in range(int(index) + 1) if history[i]["role"] == "user")


def as_messages(history: Sequence[Shown], system_prompt: str) -> list[dict[str, str]]:
    """The conversation as the engine takes it; answers that were stopped before their first word are left out."""
    system = system_prompt.strip()
    messages = [{"role": "system", "content": system}] if system else []
    for message in history:
        text = text_of(message)
        if text or message["role"] == "user":
            messages.append({"role": message["role"], "content": text})
    return messages


def figures(state: Progress) -> str:
    """How long an answer is, how fast it came, and what was lost."""
    parts = [f"{state.tokens} token{'s' * (state.tokens != 1)}"]
    if state.tokens_per_second is not None:
        parts.append(f"{state.tokens_per_second:.1f} tokens/s")
    if state.first_after >= 0.05:
        parts.append(f"first after {state.first_after:.1f} s")
    if state.finish_reason == "length":
        parts.append("cut at max tokens")
    if state.dropped_turns:
        turns = "oldest turn" if state.dropped_turns == 1 else f"{state.dropped_turns} oldest turns"
        parts.append(f"no room for the {turns}: not read")
    return " · ".join(parts)
