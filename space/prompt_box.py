"""Where one types, and sends or stops: the button is the one that fits the moment."""

from typing import Any

import gradio as gr

LONGEST = 20_000  # characters


def prompt_box(label: str, elem_id: str, autofocus: bool = False) -> gr.Textbox:
    """Where one types; Enter sends, Shift+Enter begins a new line."""
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
        max_length=LONGEST,
    )


def box_while_answering(**changes: Any) -> Any:
    return gr.update(submit_btn=False, stop_btn="Stop", **changes)


def box_ready(**changes: Any) -> Any:
    return gr.update(submit_btn="Send", stop_btn=False, **changes)
