"""The settings panel, which all tabs share."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from chatapp.engine import Sampling

DEFAULTS = Sampling()
# Run when the panel opens. It stands below the fold, and is higher only after the next frame.
SHOW = """() => setTimeout(() => document.getElementById("settings").scrollIntoView({ block: "end" }), 50)"""
MAX_TOKENS = 2048


@dataclass(frozen=True)
class Chosen:
    """The values of the settings for one answer."""

    system_prompt: str
    temperature: float
    top_p: float
    max_tokens: int

    def sampling(self) -> Sampling:
        """Raises ValueError for values outside the panel's ranges, which only a handmade request can have."""
        return Sampling(max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p)


def settings_panel(system_prompt: str, context_length: int) -> list[Any]:
    """Lay the settings out; returns their components, in the order of the fields of `Chosen`."""
    longest = min(MAX_TOKENS, context_length // 2)
    with gr.Row():
        system = gr.Textbox(
            system_prompt, label="System prompt", info="How the model should answer", lines=4, max_length=4000, scale=1
        )
        with gr.Column(scale=1, min_width=280):
            temperature = gr.Slider(
                0, 2, DEFAULTS.temperature, step=0.05, label="Temperature", info="0: always the most likely token"
            )
            top_p = gr.Slider(
                0.05,
                1,
                DEFAULTS.top_p,
                step=0.05,
                label="Top-p",
                info="Keep the likeliest tokens up to this probability",
            )
            max_tokens = gr.Slider(
                8, longest, min(DEFAULTS.max_tokens, longest), step=8, label="Max tokens", info="Longer answers are cut"
            )
    return [system, temperature, top_p, max_tokens]
