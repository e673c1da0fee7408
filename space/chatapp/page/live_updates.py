"""Follow a job from its place in the queue to its last word, as the tabs show it."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import gradio as gr

from chatapp.page.conversation import GROWING
from chatapp.server.fair_queue import Busy, Client, FairQueue, Work

T = TypeVar("T")
REFRESH = 0.06  # seconds between two updates of an answer: faster than people read, and cheap for the processor
REFRESH_PLACE = 0.4  # seconds between two updates of the place in the queue; also notices a reader who left
# For short events, which nothing but the page should call.
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# For answers: one at a time in a tab.
STREAMING: dict[str, Any] = {"trigger_mode": "once", "show_progress": "hidden", "api_visibility": "private"}
log = logging.getLogger("uvicorn.error")


def reader(request: gr.Request) -> Client:
    """The reader of this page, as the queue's client."""
    return Client(request.client.host if request.client else "", request.session_hash or "")


async def follow(queue: FairQueue, client: Client, work: Work[T]) -> AsyncIterator[T | str]:
    """The newest item of the work, again and again. A line of text instead says why there is none, or no more."""
    try:
        async with queue.join(client, work) as job:
            while not job.turn.done():
                yield waiting_line(job.ahead)
                await asyncio.wait([job.turn], timeout=REFRESH_PLACE)
            async for batch in job.batches(REFRESH):
                yield batch[-1]
    except Busy as busy:
        yield f"Too many people are asking now. Please try again in {busy.retry_after} seconds."
    except ValueError as error:
        yield f"Not answered: {error}."
    except Exception as error:
        log.error("an answer failed", exc_info=error)
        yield "The model failed to answer. The server's log has the reason."


def waiting_line(ahead: int) -> str:
    return f"waiting: {ahead} answer{'s' * (ahead != 1)} before this one {GROWING}"
