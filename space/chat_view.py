"""The chat: answers stream, and can be stopped, tried again and taken back."""

import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import gradio as gr
from conversation import Shown, answer, answer_so_far, as_messages, last_question, question, stopped, text_of
from engine import Engine
from fair_queue import FairQueue
from follow import AT_ONCE, STREAMING, follow, reader
from progress import Progress, progress
from prompt_box import box_ready, box_while_answering, prompt_box
from settings import Chosen

EXAMPLES = [
    "My laptop is slow. What should I do first?",
    "Explain in two sentences why the sky is blue.",
    "Write a short, polite email asking to move a meeting to Friday.",
    "Give me three ideas for a rainy Sunday with children.",
]
Updates = AsyncIterator[tuple[Any, Any]]  # of the prompt box and of the conversation


def chat_view(engine: Engine, queue: FairQueue, settings: list[Any]) -> None:
    """Lay the chat out."""
    chatbot = gr.Chatbot(
        label="Conversation",
        show_label=False,
        elem_id="chat",
        scale=1,
        height="100%",
        buttons=["copy"],
        examples=[{"text": example} for example in EXAMPLES],
        placeholder="### What would you like to know?",
    )
    box = prompt_box("Message", "chat-box", autofocus=True)

    async def answered(conversation: list[Shown], values: tuple[Any, ...], request: gr.Request, box: Any) -> Updates:
        chosen = Chosen(*values)

        def work(cancel: threading.Event) -> Iterator[Progress]:
            return progress(engine.stream(as_messages(conversation, chosen.system_prompt), chosen.sampling(), cancel))

        shown = answer("", "…")
        yield box, [*conversation, shown]
        async for state in follow(queue, reader(request), work):
            shown = answer_so_far(state, shown)
            yield gr.skip(), [*conversation, shown]
        yield box_ready(), gr.skip()

    async def ask(request: gr.Request, text: str, history: list[Shown], *values: Any) -> Updates:
        if text.strip():
            async for update in answered([*history, question(text)], values, request, box_while_answering(value="")):
                yield update

    async def ask_example(event: gr.SelectData, request: gr.Request, history: list[Shown], *values: Any) -> Updates:
        async for update in answered([*history, question(event.value["text"])], values, request, box_while_answering()):
            yield update

    async def retry(event: gr.RetryData, request: gr.Request, history: list[Shown], *values: Any) -> Updates:
        asked = history[: last_question(history, event.index) + 1]
        async for update in answered(asked, values, request, box_while_answering()):
            yield update

    def stop(history: list[Shown]) -> tuple[Any, list[Shown]]:
        return box_ready(), stopped(history)

    def undo(event: gr.UndoData, history: list[Shown]) -> tuple[Any, list[Shown]]:
        at = last_question(history, event.index)
        return box_ready(value=text_of(history[at])), history[:at]

    outputs = [box, chatbot]
    running: list[Any] = [
        box.submit(ask, [box, chatbot, *settings], outputs, **STREAMING),
        chatbot.example_select(ask_example, [chatbot, *settings], outputs, **STREAMING),
        chatbot.retry(retry, [chatbot, *settings], outputs, **STREAMING),
    ]
    # First the answer ends, then it is said: an update on its way would else take the word away again.
    box.stop(None, cancels=running).then(stop, [chatbot], outputs, **AT_ONCE)
    chatbot.undo(undo, [chatbot], outputs, cancels=running, **AT_ONCE)
    chatbot.clear(box_ready, None, [box], cancels=running, **AT_ONCE)
