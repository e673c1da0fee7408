"""Read a request, and send the answers of its job: as one object, or as server-sent events."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from chatapp.engine import Chunk
from chatapp.server.api_errors import ApiError, ClientGone, as_api_error
from chatapp.server.completion import Choice, Shape, event
from chatapp.server.fair_queue import Client, Job
from chatapp.server.openai_schema import AnyRequest, problems
from chatapp.server.stop_sequences import until_stop

T = TypeVar("T")
R = TypeVar("R", bound=AnyRequest)
Numbered = tuple[int, Chunk]  # a chunk of the answer of this number
TIMEOUT_BODY = 20  # seconds in which a request's body must arrive


async def parse(request: Request, kind: type[R]) -> R:
    """The request's body. FastAPI's own body parameter has no timeout, and accepts text that is not valid Unicode."""
    # A browser sends this type to another site only with that site's permission: pages of other sites are kept out.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the Content-Type must be application/json")
    try:
        async with asyncio.timeout(TIMEOUT_BODY):
            body = await request.body()
    except TimeoutError:
        raise ApiError(408, f"the request took longer than {TIMEOUT_BODY} s to arrive") from None
    try:
        # A long history takes a second to check; in a thread, it delays no other request.
        return await asyncio.to_thread(kind.model_validate_json, body)
    except ValidationError as error:
        raise ApiError(400, *problems(error)) from None


def client_of(request: Request) -> Client:
    key = request.headers.get("authorization", "")
    address = request.client.host if request.client else ""
    return Client(address, hashlib.sha256(key.encode()).hexdigest() if key else "")


def in_turn(streams: Sequence[Callable[[], Iterator[Chunk]]], stops: Sequence[str]) -> Iterator[Numbered]:
    """The chunks of several answers, one answer after the other. Each one ends at a stop sequence."""
    for index, stream in enumerate(streams):
        for chunk in until_stop(stream(), stops):
            yield index, chunk


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client disconnects first, `work` is cancelled and ClientGone is raised.

    The request's body must have been read.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


class EventStream(StreamingResponse):
    """Server-sent events of a job, which is left however the response ends.

    FastAPI's EventSourceResponse sends the status before the first event; here the model may still refuse the messages.
    """

    def __init__(self, job: Job, events: AsyncIterator[str]) -> None:
        # X-Accel-Buffering: without it a proxy may collect the events.
        super().__init__(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.leave()


async def collect(chunks: AsyncIterator[Numbered], count: int) -> list[Choice]:
    """`count` complete answers."""
    choices: list[Choice] = [[] for _ in range(count)]
    async for index, chunk in chunks:
        choices[index].append(chunk)
    return choices


async def first_of(chunks: AsyncIterator[Numbered]) -> Numbered:
    return await anext(chunks)


async def events(
    shape: Shape, first: Numbered, chunks: AsyncIterator[Numbered], count: int, include_usage: bool
) -> AsyncIterator[str]:
    """The events of `count` streamed answers. `first` was taken from `chunks` already."""
    for begun in shape.first():
        yield event(begun)
    ends: list[Chunk] = []
    try:
        index, chunk = first
        while True:
            for piece in shape.pieces(index, chunk):
                yield event(piece)
            if chunk.finish_reason:
                ends.append(chunk)
            if len(ends) == count:
                break
            index, chunk = await anext(chunks)
    except Exception as error:  # the status is sent, so the error becomes an event
        yield event(as_api_error(error).body)
        return
    if include_usage:
        yield event(shape.usage(ends))
    yield "data: [DONE]\n\n"
