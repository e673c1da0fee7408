"""The chat page: a chat with the first model, all models side by side, and their cards."""

from collections.abc import Mapping
from pathlib import Path

import gradio as gr
from card import about, subtitle, title
from chat_view import chat_view
from compare_view import compare_view
from engine import Engine
from fair_queue import FairQueue
from follow import AT_ONCE
from settings import settings_panel

MOST_SESSIONS = 1000  # whose state Gradio keeps, some 40 KB each; the oldest go first
STYLE = Path(__file__).with_name("page.css")
# Fonts that are on the reader's machine: nothing is fetched.
THEME = gr.themes.Soft(
    primary_hue="teal",
    neutral_hue="slate",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
)


def chat_page(engines: Mapping[str, Engine], queue: FairQueue, commit: str = "") -> gr.Blocks:
    """The page for `engines` by the name of their model; the first is the one to chat with."""
    engine = next(iter(engines.values()))
    with gr.Blocks(title=title(engine.card), fill_height=True, analytics_enabled=False) as page:
        gr.Markdown(f"# {title(engine.card)}\n{subtitle(engine.card)}", elem_id="title")
        # Laid out below the views, which use it.
        with gr.Accordion("Settings", open=False, elem_id="settings", render=False) as panel:
            settings = settings_panel(engine.card.get("system_prompt") or "", engine.context_length)
        with gr.Tab("Chat") as chat:
            chat_view(engine, queue, settings)
        views = [chat]
        if len(engines) > 1:
            with gr.Tab("Compare") as compare:
                compare_view(engines, queue, settings)
            views.append(compare)
        with gr.Tab("About the model") as about_tab:
            gr.Markdown(about({name: engine.card for name, engine in engines.items()}, commit), elem_id="about")
        panel.render()
        for view in views:
            view.select(lambda: gr.update(visible=True), None, panel, **AT_ONCE)
        about_tab.select(lambda: gr.update(visible=False), None, panel, **AT_ONCE)
    # The line before the model is ours; Gradio's own queue only bounds how many may look at it.
    page.state_session_capacity = MOST_SESSIONS
    page.queue(api_open=False, default_concurrency_limit=None, max_size=4 * queue.places)
    return page
