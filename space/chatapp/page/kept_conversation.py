"""Conversations in the reader's browser: a reload of the page keeps them. The server stores none."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from chatapp.page.conversation import Shown, answer, question, stopped


def keeper(model: str, view: str) -> gr.BrowserState:
    """The browser's store for the conversations of a view with this model."""
    key = f"{model}: {view}"
    # Gradio encrypts the store with a secret of each start. With a fixed one, conversations survive a restart, too.
    return gr.BrowserState(None, storage_key=key, secret=key)


def restored(value: Any) -> list[Shown]:
    """The conversation in a store. An answer that a reload interrupted is marked as stopped.

    A value that is no conversation gives an empty one: another version of the app, or the reader, may have written it.
    """
    try:
        return stopped([_message(message) for message in value or []])
    except (KeyError, TypeError, ValueError):
        return []


def all_restored(value: Any, names: Sequence[str]) -> list[list[Shown]]:
    """The conversations with several models, whose questions are the same, in the order of `names`."""
    stored = value if isinstance(value, dict) else {}
    histories = [restored(stored.get(name)) for name in names]
    asked = [[message if message["role"] == "user" else None for message in history] for history in histories]
    return histories if all(questions == asked[0] for questions in asked) else [[] for _ in names]


def _message(message: Any) -> Shown:
    """The message with nothing but its texts. Raises KeyError, TypeError or ValueError when it is none."""
    texts = [part["text"] for part in message["content"]]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a part of a message is no text")
    if message["role"] == "user":
        (text,) = texts
        return question(text)
    text, note = texts
    return answer(text, note)
