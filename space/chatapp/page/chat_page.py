"""The page: a chat with the first model, all models side by side, and their cards."""

from collections.abc import Mapping
from pathlib import Path

import gradio as gr

from chatapp.engine import Engine
from chatapp.page.chat_view import ChatView
from chatapp.page.compare_view import CompareView
from chatapp.page.live_updates import AT_ONCE
from chatapp.page.model_card import about, subtitle, title
from chatapp.page.settings_panel import settings_panel
from chatapp.server.fair_queue import FairQueue

MAX_SESSIONS = 1000  # Gradio keeps the state of each, about 40 KB, and drops the oldest
STYLE = Path(__file__).with_name("chat_page.css")
# Fonts of the reader's machine: the page loads none.
THEME = gr.themes.Soft(
    primary_hue="teal",
    neutral_hue="slate",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
)


def chat_page(engines: Mapping[str, Engine], queue: FairQueue, commit: str = "") -> gr.Blocks:
    """The page for `engines`, by the name of their model; the chat uses the first one. `commit`: see `about`."""
    engine = next(iter(engines.values()))
    with gr.Blocks(title=title(engine.card), fill_height=True, analytics_enabled=False) as page:
        gr.Markdown(f"# {title(engine.card)}\n{subtitle(engine.card)}", elem_id="title")
        # The panel stands below the views, but they need its components first.
        with gr.Accordion("Settings", open=False, elem_id="settings", render=False) as panel:
            settings = settings_panel(engine.card.get("system_prompt") or "", engine.context_length)
        with gr.Tab("Chat") as chat:
            ChatView(engine, queue, settings)
        views = [chat]
        if len(engines) > 1:
            with gr.Tab("Compare") as compare:
                CompareView(engines, queue, settings)
            views.append(compare)
        with gr.Tab("About the model") as about_tab:
            gr.Markdown(about({name: engine.card for name, engine in engines.items()}, commit), elem_id="about")
        panel.render()
        for view in views:
            view.select(lambda: gr.update(visible=True), None, panel, **AT_ONCE)
        about_tab.select(lambda: gr.update(visible=False), None, panel, **AT_ONCE)
    page.state_session_capacity = MAX_SESSIONS
    # The fair queue decides who is next. Gradio's own queue only limits how many readers may wait.
    page.queue(api_open=False, default_concurrency_limit=None, max_size=4 * queue.places)
    return page
