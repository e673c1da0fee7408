"""The compare tab: all models side by side, with the same prompts and settings, and answers that grow together."""

import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import gradio as gr

from chatapp.engine import Engine
from chatapp.page.answer_progress import Progress, progress, side_by_side
from chatapp.page.conversation import Shown, answer, answer_so_far, as_messages, question, stopped
from chatapp.page.live_updates import AT_ONCE, STREAMING, follow, reader
from chatapp.page.prompt_box import box_ready, box_while_answering, prompt_box
from chatapp.page.settings_panel import Chosen
from chatapp.server.fair_queue import FairQueue

Updates = AsyncIterator[tuple[Any, ...]]  # of the prompt box, and of the conversation with each model


class CompareView:
    """Lays the tab out when it is made; the models stand in the order base, tuned. Gradio calls the other methods."""

    def __init__(self, engines: Mapping[str, Engine], queue: FairQueue, settings: list[Any]) -> None:
        self._engines = engines
        self._queue = queue
        self._names = sorted(engines)
        with gr.Row(scale=1, elem_id="compare", equal_height=True):
            chatbots = [self._chatbot(name) for name in self._names]
        box = prompt_box("Message to all models", "compare-box")
        outputs = [box, *chatbots]
        running: list[Any] = [box.submit(self.ask, [box, *chatbots, *settings], outputs, **STREAMING)]
        # Cancel first, then mark as stopped; a late update would overwrite the mark.
        box.stop(None, cancels=running).then(self.stop, chatbots, outputs, **AT_ONCE)
        for chatbot in chatbots:
            chatbot.clear(self.clear, None, outputs, cancels=running, **AT_ONCE)

    def _chatbot(self, name: str) -> gr.Chatbot:
        return gr.Chatbot(
            label=name,
            elem_id=f"compare-{name}",
            height="100%",
            min_height=260,
            min_width=320,
            buttons=["copy"],
            placeholder=f"Answers of the {name} model",
        )

    async def ask(self, request: gr.Request, text: str, *rest: Any) -> Updates:
        """`rest`: the conversation with each model, and then the settings."""
        if not text.strip():
            return
        names = self._names
        histories, chosen = rest[: len(names)], Chosen(*rest[len(names) :])
        asked = {name: [*history, question(text)] for name, history in zip(names, histories, strict=True)}
        shown: dict[str, Shown] = {name: answer("", "…") for name in names}
        yield box_while_answering(value=""), *([*asked[name], shown[name]] for name in names)

        def work(cancel: threading.Event) -> Iterator[dict[str, Progress]]:
            return side_by_side({name: self._progress(name, asked[name], chosen, cancel) for name in names})

        async for state in follow(self._queue, reader(request), work):
            for name in names:
                if isinstance(state, str):
                    shown[name] = answer_so_far(state, shown[name])
                elif name in state:
                    shown[name] = answer_so_far(state[name])
            yield gr.skip(), *([*asked[name], shown[name]] for name in names)
        yield box_ready(), *(gr.skip() for _ in names)

    def _progress(
        self, name: str, conversation: list[Shown], chosen: Chosen, cancel: threading.Event
    ) -> Iterator[Progress]:
        messages = as_messages(conversation, chosen.system_prompt)
        return progress(self._engines[name].stream(messages, chosen.sampling(), cancel))

    def stop(self, *histories: list[Shown]) -> tuple[Any, ...]:
        return box_ready(), *(stopped(history) for history in histories)

    def clear(self) -> tuple[Any, ...]:
        return box_ready(), *([] for _ in self._names)
