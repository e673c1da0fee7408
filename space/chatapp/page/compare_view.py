"""The compare tab: all models side by side, with the same prompts and settings, and answers that grow together.

The conversations have the same questions. Retry, undo and clear therefore act on all of them.
"""

import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import gradio as gr

from chatapp.engine import Engine
from chatapp.page.answer_progress import Progress, progress, side_by_side
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
from chatapp.page.kept_conversation import all_restored
from chatapp.page.live_updates import AT_ONCE, STREAMING, follow, reader
from chatapp.page.prompt_box import box_ready, box_while_answering, prompt_box
from chatapp.page.settings_panel import Chosen
from chatapp.server.fair_queue import FairQueue

Update = tuple[Any, ...]  # of the prompt box, of the conversation with each model, and of the conversations' store


class CompareView:
    """Lays the tab out when it is made; the models stand in the order base, tuned. Gradio calls the methods without an
    underscore, by the types they name."""

    def __init__(
        self, engines: Mapping[str, Engine], queue: FairQueue, settings: list[Any], kept: gr.BrowserState
    ) -> None:
        self._engines = engines
        self._queue = queue
        self._names = sorted(engines)
        with gr.Row(scale=1, elem_id="compare", equal_height=True):
            self._chatbots = [self._chatbot(name) for name in self._names]
        self._kept = kept
        self._connect(prompt_box("Message to all models", "compare-box"), settings)

    def _chatbot(self, name: str) -> gr.Chatbot:
        return gr.Chatbot(
            label=name,
            elem_id=f"compare-{name}",
            height="100%",
            min_height=160,
            min_width=320,
            buttons=["copy"],
            placeholder=f"Answers of the {name} model",
        )

    def _connect(self, box: gr.Textbox, settings: list[Any]) -> None:
        chatbots = self._chatbots
        outputs = [box, *chatbots, self._kept]
        running: list[Any] = [box.submit(self.ask, [box, *chatbots, *settings], outputs, **STREAMING)]
        for chatbot in chatbots:
            running.append(chatbot.retry(self.retry, [*chatbots, *settings], outputs, **STREAMING))
        # Cancel first, then mark as stopped; a late update would overwrite the mark.
        box.stop(None, cancels=running).then(self.stop, chatbots, outputs, **AT_ONCE)
        for chatbot in chatbots:
            chatbot.undo(self.undo, chatbots, outputs, cancels=running, **AT_ONCE)
            chatbot.clear(self.clear, None, outputs, cancels=running, **AT_ONCE)

    def restore_on_load(self, page: gr.Blocks) -> None:
        page.load(self.restore, [self._kept], self._chatbots, **AT_ONCE)

    def restore(self, kept: Any) -> list[Any]:
        return [history or gr.skip() for history in all_restored(kept, self._names)]

    async def ask(self, request: gr.Request, text: str, *rest: Any) -> AsyncIterator[Update]:
        """`rest`: the conversation with each model, and then the settings."""
        if text.strip():
            histories, values = self._split(rest)
            asked = [[*history, question(text)] for history in histories]
            async for update in self._answered(asked, values, request, box_while_answering(value="")):
                yield update

    async def retry(self, event: gr.RetryData, request: gr.Request, *rest: Any) -> AsyncIterator[Update]:
        """`rest`: as in `ask`."""
        histories, values = self._split(rest)
        at = last_question(histories[0], event.index)
        asked = [history[: at + 1] for history in histories]
        async for update in self._answered(asked, values, request, box_while_answering()):
            yield update

    def undo(self, event: gr.UndoData, *histories: list[Shown]) -> Update:
        at = last_question(histories[0], event.index)
        return self._update(box_ready(value=text_of(histories[0][at])), [history[:at] for history in histories])

    def stop(self, *histories: list[Shown]) -> Update:
        return self._update(box_ready(), [stopped(history) for history in histories])

    def clear(self) -> Update:
        return self._update(box_ready(), [[] for _ in self._names])

    def _split(self, rest: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The conversations, and the values of the settings."""
        return rest[: len(self._names)], rest[len(self._names) :]

    def _update(self, box: Any, histories: Sequence[list[Shown]]) -> Update:
        return box, *histories, dict(zip(self._names, histories, strict=True))

    async def _answered(
        self, asked: Sequence[list[Shown]], values: tuple[Any, ...], request: gr.Request, box: Any
    ) -> AsyncIterator[Update]:
        """Answer the conversations with the settings `values`; `box` is the prompt box's first update."""
        chosen = Chosen(*values)
        conversations = dict(zip(self._names, asked, strict=True))
        shown = {name: answer("", GROWING) for name in self._names}

        def work(cancel: threading.Event) -> Iterator[dict[str, Progress]]:
            return side_by_side({name: self._progress(name, conversations[name], chosen, cancel) for name in shown})

        def grown() -> list[list[Shown]]:
            return [[*conversations[name], shown[name]] for name in self._names]

        yield self._update(box, grown())
        async for state in follow(self._queue, reader(request), work):
            for name in self._names:
                if isinstance(state, str):
                    shown[name] = answer_so_far(state, shown[name])
                elif name in state:
                    shown[name] = answer_so_far(state[name])
            yield self._update(gr.skip(), grown())
        yield box_ready(), *(gr.skip() for _ in self._names), gr.skip()

    def _progress(
        self, name: str, conversation: list[Shown], chosen: Chosen, cancel: threading.Event
    ) -> Iterator[Progress]:
        messages = as_messages(conversation, chosen.system_prompt)
        return progress(self._engines[name].stream(messages, chosen.sampling(), cancel))
