"""All models side by side: the same prompts, the same settings, answers that grow together."""

import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import gradio as gr
from conversation import Shown, answer, answer_so_far, as_messages, question, stopped
from engine import Engine
from fair_queue import FairQueue
from follow import AT_ONCE, STREAMING, follow, reader
from progress import Progress, progress, side_by_side
from prompt_box import box_ready, box_while_answering, prompt_box
from settings import Chosen

Updates = AsyncIterator[tuple[Any, ...]]  # of the prompt box, and of the conversation with each model


def compare_view(engines: Mapping[str, Engine], queue: FairQueue, settings: list[Any]) -> None:
    """Lay the comparison out; the models stand in the order base, tuned."""
    names = sorted(engines)
    with gr.Row(scale=1, elem_id="compare", equal_height=True):
        chatbots = [
            gr.Chatbot(
                label=name,
                elem_id=f"compare-{name}",
                height="100%",
                min_height=260,
                min_width=320,
                buttons=["copy"],
                placeholder=f"What the {name} model answers",
            )
            for name in names
        ]
    box = prompt_box("Message to all models", "compare-box")

    async def ask(request: gr.Request, text: str, *rest: Any) -> Updates:
        if not text.strip():
            return
        histories, chosen = rest[: len(names)], Chosen(*rest[len(names) :])
        asked = {name: [*history, question(text)] for name, history in zip(names, histories, strict=True)}

        def work(cancel: threading.Event) -> Iterator[dict[str, Progress]]:
            return side_by_side(
                {
                    name: progress(
                        engines[name].stream(as_messages(conversation, chosen.system_prompt), chosen.sampling(), cancel)
                    )
                    for name, conversation in asked.items()
                }
            )

        shown: dict[str, Shown] = {name: answer("", "…") for name in names}
        yield box_while_answering(value=""), *([*asked[name], shown[name]] for name in names)
        async for state in follow(queue, reader(request), work):
            for name in names:
                if isinstance(state, str):
                    shown[name] = answer_so_far(state, shown[name])
                elif name in state:
                    shown[name] = answer_so_far(state[name])
            yield gr.skip(), *([*asked[name], shown[name]] for name in names)
        yield box_ready(), *(gr.skip() for _ in names)

    def stop(*histories: list[Shown]) -> tuple[Any, ...]:
        return box_ready(), *(stopped(history) for history in histories)

    def clear_all() -> tuple[Any, ...]:
        return box_ready(), *([] for _ in names)

    outputs = [box, *chatbots]
    running: list[Any] = [box.submit(ask, [box, *chatbots, *settings], outputs, **STREAMING)]
    box.stop(None, cancels=running).then(stop, chatbots, outputs, **AT_ONCE)
    for chatbot in chatbots:
        chatbot.clear(clear_all, None, outputs, cancels=running, **AT_ONCE)
