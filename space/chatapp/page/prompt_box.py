"""The text box for prompts. Its button sends, or stops while an answer grows."""

from typing import Any

import gradio as gr

MAX_CHARACTERS = 20_000


def prompt_box(label: str, elem_id: str, autofocus: bool = False) -> gr.Textbox:
    """A prompt box: Enter sends, Shift+Enter begins a new line."""
    return gr.Textbox(
        label=label,
        show_label=False,
        placeholder="Type a message …",
        elem_id=elem_id,
        submit_btn="Send",
        stop_btn=False,
        autofocus=autofocus,
        lines=1,
        max_lines=8,
        max_length=MAX_CHARACTERS,
    )


def box_while_answering(**changes: Any) -> Any:
    return gr.update(submit_btn=False, stop_btn="Stop", **changes)


def box_ready(**changes: Any) -> Any:
    return gr.update(submit_btn="Send", stop_btn=False, **changes)
