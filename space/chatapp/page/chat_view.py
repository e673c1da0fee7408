"""The chat tab: answers stream, and the reader can stop, retry and undo them."""

import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import gradio as gr

from chatapp.engine import Engine
from chatapp.page.answer_progress import Progress, progress
from chatapp.page.conversation import (
    GROWING,
    Shown,
    answer,
    answer_so_far,
    as_messages,
    last_question,
    question,
    stopped,
    text_of,
)
from chatapp.page.kept_conversation import restored
from chatapp.page.live_updates import AT_ONCE, STREAMING, follow, reader
from chatapp.page.prompt_box import box_ready, box_while_answering, prompt_box
from chatapp.page.settings_panel import Chosen
from chatapp.server.fair_queue import FairQueue

EXAMPLES = [
    "My laptop is slow. What should I do first?",
    "Explain in two sentences why the sky is blue.",
    "Write a short, polite email asking to move a meeting to Friday.",
    "Give me three ideas for a rainy Sunday with children.",
]
Updates = AsyncIterator[tuple[Any, Any, Any]]  # of the prompt box, the conversation, and the conversation's store


class ChatView:
    """Lays the tab out when it is made. Gradio calls the methods without an underscore, by the types they name."""

    def __init__(self, engine: Engine, queue: FairQueue, settings: list[Any], kept: gr.BrowserState) -> None:
        self._engine = engine
        self._queue = queue
        self._chatbot = gr.Chatbot(
            label="Conversation",
            show_label=False,
            elem_id="chat",
            scale=1,
            height="100%",
            buttons=["copy"],
            examples=[{"text": example} for example in EXAMPLES],
            placeholder="### What would you like to know?",
        )
        self._box = prompt_box("Message", "chat-box", autofocus=True)
        self._kept = kept
        self._connect(settings)

    def _connect(self, settings: list[Any]) -> None:
        box, chatbot, kept = self._box, self._chatbot, self._kept
        outputs = [box, chatbot, kept]
        running: list[Any] = [
            box.submit(self.ask, [box, chatbot, *settings], outputs, **STREAMING),
            chatbot.example_select(self.ask_example, [chatbot, *settings], outputs, **STREAMING),
            chatbot.retry(self.retry, [chatbot, *settings], outputs, **STREAMING),
        ]
        # Cancel first, then mark as stopped; a late update would overwrite the mark.
        box.stop(None, cancels=running).then(self.stop, [chatbot], outputs, **AT_ONCE)
        chatbot.undo(self.undo, [chatbot], outputs, cancels=running, **AT_ONCE)
        chatbot.clear(self.clear, None, outputs, cancels=running, **AT_ONCE)

    def restore_on_load(self, page: gr.Blocks) -> None:
        page.load(self.restore, [self._kept], [self._chatbot], **AT_ONCE)

    def restore(self, kept: Any) -> Any:
        return restored(kept) or gr.skip()

    async def ask(self, request: gr.Request, text: str, history: list[Shown], *values: Any) -> Updates:
        if text.strip():
            asked, box = [*history, question(text)], box_while_answering(value="")
            async for update in self._answered(asked, values, request, box):
                yield update

    async def ask_example(
        self, event: gr.SelectData, request: gr.Request, history: list[Shown], *values: Any
    ) -> Updates:
        asked = [*history, question(event.value["text"])]
        async for update in self._answered(asked, values, request, box_while_answering()):
            yield update

    async def retry(self, event: gr.RetryData, request: gr.Request, history: list[Shown], *values: Any) -> Updates:
        asked = history[: last_question(history, event.index) + 1]
        async for update in self._answered(asked, values, request, box_while_answering()):
            yield update

    def stop(self, history: list[Shown]) -> tuple[Any, list[Shown], list[Shown]]:
        conversation = stopped(history)
        return box_ready(), conversation, conversation

    def undo(self, event: gr.UndoData, history: list[Shown]) -> tuple[Any, list[Shown], list[Shown]]:
        at = last_question(history, event.index)
        return box_ready(value=text_of(history[at])), history[:at], history[:at]

    def clear(self) -> tuple[Any, list[Shown], list[Shown]]:
        return box_ready(), [], []

    async def _answered(
        self, conversation: list[Shown], values: tuple[Any, ...], request: gr.Request, box: Any
    ) -> Updates:
        """Answer the conversation with the settings `values`; `box` is the prompt box's first update."""
        chosen = Chosen(*values)

        def work(cancel: threading.Event) -> Iterator[Progress]:
            messages = as_messages(conversation, chosen.system_prompt)
            return progress(self._engine.stream(messages, chosen.sampling(), cancel))

        shown = answer("", GROWING)
        yield box, [*conversation, shown], [*conversation, shown]
        async for state in follow(self._queue, reader(request), work):
            shown = answer_so_far(state, shown)
            yield gr.skip(), [*conversation, shown], [*conversation, shown]
        yield box_ready(), gr.skip(), gr.skip()
