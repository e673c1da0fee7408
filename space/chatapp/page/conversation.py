"""A conversation as the page shows it. Each answer has a line of figures below it, which the models never read."""

from collections.abc import Sequence
from typing import Any

from chatapp.page.answer_progress import Progress

Shown = dict[str, Any]  # a message of gr.Chatbot: its role, and its content as a list of parts
GROWING = "…"  # ends the line below an answer that is not complete


def question(text: str) -> Shown:
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def answer(text: str, note: str) -> Shown:
    return {"role": "assistant", "content": [{"type": "text", "text": part} for part in (text, note)]}


def answer_so_far(state: Progress | str, before: Shown | None = None) -> Shown:
    """The answer with its figures. If `state` is a line of text: the text so far (of `before`), and this line below."""
    if isinstance(state, str):
        return answer(text_of(before) if before else "", state)
    return answer(state.text, figures(state))


def stopped(history: Sequence[Shown]) -> list[Shown]:
    """The conversation; its last answer is marked as stopped if it was not complete."""
    if not history or history[-1]["role"] != "assistant":
        return list(history)
    text, note = (part["text"] for part in history[-1]["content"])
    if not note.endswith(GROWING):
        return list(history)
    note = note.removesuffix(GROWING).rstrip()
    return [*history[:-1], answer(text, f"{note} · stopped" if text else "stopped")]


def text_of(message: Shown) -> str:
    """The message's text without its line of figures."""
    return str(message["content"][0]["text"])


def last_question(history: Sequence[Shown], index: Any) -> int:
    """The index of the last question up to `index`, which comes from an event of gr.Chatbot."""
    return max(i for i in range(int(index) + 1) if history[i]["role"] == "user")


def as_messages(history: Sequence[Shown], system_prompt: str) -> list[dict[str, str]]:
    """The conversation for the engine, without the answers that were stopped before their first word."""
    system = system_prompt.strip()
    messages = [{"role": "system", "content": system}] if system else []
    for message in history:
        text = text_of(message)
        if text or message["role"] == "user":
            messages.append({"role": message["role"], "content": text})
    return messages


def figures(state: Progress) -> str:
    """The line below an answer: its length, its speed, and whether the answer or the conversation was cut."""
    parts = [f"{state.tokens} token{'s' * (state.tokens != 1)}"]
    if state.tokens_per_second is not None:
        parts.append(f"{state.tokens_per_second:.1f} tokens/s")
    if state.first_after >= 0.05:
        parts.append(f"first token after {state.first_after:.1f} s")
    if state.finish_reason == "length":
        parts.append("cut at max tokens")
    if state.dropped_turns:
        turns = "oldest turn" if state.dropped_turns == 1 else f"{state.dropped_turns} oldest turns"
        parts.append(f"the {turns} did not fit: not read")
    return " · ".join(parts) + ("" if state.finish_reason else f" {GROWING}")
