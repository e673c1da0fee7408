"""The settings that all views share."""

from dataclasses import dataclass
from typing import Any

import gradio as gr
from engine import Sampling

DEFAULTS = Sampling()
MOST_TOKENS = 2048


@dataclass(frozen=True)
class Chosen:
    """The values of the settings at one answer."""

    system_prompt: str
    temperature: float
    top_p: float
    max_tokens: int

    def sampling(self) -> Sampling:
        """Raises ValueError for values that the page itself does not offer."""
        return Sampling(max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p)


def settings_panel(system_prompt: str, context_length: int) -> list[Any]:
    """Lay the settings out; returns the components whose values, in this order, make a `Chosen`."""
    most = min(MOST_TOKENS, context_length // 2)
    with gr.Row():
        system = gr.Textbox(
            system_prompt, label="System prompt", info="How the model should answer", lines=4, max_length=4000, scale=1
        )
        with gr.Column(scale=1, min_width=280):
            temperature = gr.Slider(
                0, 2, DEFAULTS.temperature, step=0.05, label="Temperature", info="0: always the likeliest token"
            )
            top_p = gr.Slider(
                0.05, 1, DEFAULTS.top_p, step=0.05, label="Top-p", info="Choose among the likeliest of this total"
            )
            max_tokens = gr.Slider(
                8, most, min(DEFAULTS.max_tokens, most), step=8, label="Max tokens", info="An answer is cut there"
            )
    return [system, temperature, top_p, max_tokens]
