"""Following a job from its place in the line to its last word, as the views show it."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import gradio as gr
from fair_queue import Busy, Client, FairQueue, Work

T = TypeVar("T")
REFRESH = 0.06  # seconds between two updates of an answer: faster than one reads, and easy on the processor
LOOK_AT_LINE = 0.4  # … and between two of the place in the line; so soon, too, a reader who left it is noticed
# Of the small steps that are done at once, and that nobody else should call.
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# Of the answers: one at a time in a view.
STREAMING: dict[str, Any] = {"trigger_mode": "once", "show_progress": "hidden", "api_visibility": "private"}
log = logging.getLogger("uvicorn.error")


def reader(request: gr.Request) -> Client:
    """Whom the line knows the reader of this page as."""
    return Client(request.client.host if request.client else "", request.session_hash or "")


async def follow(queue: FairQueue, client: Client, work: Work[T]) -> AsyncIterator[T | str]:
    """What the work has made so far, again and again; or a line that says why there is nothing yet, or no more."""
    try:
        async with queue.join(client, work) as job:
            while not job.turn.done():
                yield waiting_line(job.ahead)
                await asyncio.wait([job.turn], timeout=LOOK_AT_LINE)
            async for batch in job.batches(REFRESH):
                yield batch[-1]
    except Busy as busy:
        yield f"Many people are asking just now. Please try again in {busy.retry_after} seconds."
    except ValueError as error:
        yield f"Not answered: {error}."
    except Exception as error:
        log.error("an answer failed", exc_info=error)
        yield "The model failed at this answer; the server's log says why."


def waiting_line(ahead: int) -> str:
    return f"waiting: {ahead} answer{'s' * (ahead != 1)} before this one"
