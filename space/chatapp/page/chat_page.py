"""The page: a chat with the first model, all models side by side, and their cards."""

from collections.abc import Mapping

import gradio as gr

from chatapp.engine import Engine
from chatapp.page.api_usage import usage
from chatapp.page.chat_view import ChatView
from chatapp.page.compare_view import CompareView
from chatapp.page.kept_conversation import keeper
from chatapp.page.live_updates import AT_ONCE
from chatapp.page.model_card import Evaluation, about, subtitle, title
from chatapp.page.settings_panel import SHOW, settings_panel
from chatapp.server.fair_queue import FairQueue

MAX_SESSIONS = 1000  # Gradio keeps the state of each, about 40 KB, and drops the oldest


def chat_page(
    engines: Mapping[str, Engine],
    queue: FairQueue,
    commit: str = "",
    evaluation: Evaluation | None = None,
    needs_key: bool = False,
) -> gr.Blocks:
    """The page for `engines`, by the name of their model; the chat uses the first one.

    `commit`, `evaluation`: see `about`. `needs_key`: whether the API does; the page itself needs none.
    """
    engine = next(iter(engines.values()))
    with gr.Blocks(title=title(engine.card), fill_height=True, analytics_enabled=False) as page:
        gr.Markdown(f"# {title(engine.card)}\n{subtitle(engine.card)}", elem_id="title")
        # A store inside a tab would be read only when a reader opens the tab.
        kept = {view: keeper(title(engine.card), view) for view in ("chat", "compare")}
        # The panel stands below the views, but they need its components first.
        with gr.Accordion("Settings", open=False, elem_id="settings", render=False) as panel:
            settings = settings_panel(engine.card.get("system_prompt") or "", engine.context_length)
        with gr.Tab("Chat") as chat:
            ChatView(engine, queue, settings, kept["chat"]).restore_on_load(page)
        views = [chat]
        if len(engines) > 1:
            with gr.Tab("Compare") as compare:
                CompareView(engines, queue, settings, kept["compare"]).restore_on_load(page)
            views.append(compare)
        texts = [_about_tab(engines, commit, evaluation), _api_tab(list(engines), needs_key, page)]
        panel.render()
        panel.expand(None, js=SHOW, **AT_ONCE)
        for view in views:
            view.select(lambda: gr.update(visible=True), None, panel, **AT_ONCE)
        for text in texts:
            text.select(lambda: gr.update(visible=False), None, panel, **AT_ONCE)
    page.state_session_capacity = MAX_SESSIONS
    # The fair queue decides who is next. Gradio's own queue only limits how many readers may wait.
    page.queue(api_open=False, default_concurrency_limit=None, max_size=4 * queue.places)
    return page


def _about_tab(engines: Mapping[str, Engine], commit: str, evaluation: Evaluation | None) -> gr.Tab:
    with gr.Tab("About") as tab:
        cards = {name: engine.card for name, engine in engines.items()}
        gr.Markdown(about(cards, commit, evaluation), elem_id="about")
    return tab


def _api_tab(names: list[str], needs_key: bool, page: gr.Blocks) -> gr.Tab:
    def usage_here(request: gr.Request) -> str:
        """The usage at the address where the reader sees the page."""
        scheme = request.request.url.scheme if request.request else "http"
        return usage(f"{scheme}://{request.headers['host']}", names, needs_key)

    with gr.Tab("API") as tab:
        page.load(usage_here, None, gr.Markdown(elem_id="api"), **AT_ONCE)
    return tab
