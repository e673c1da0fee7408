"""The OpenAI-style API: /v1/chat/completions (streamed or not), /v1/models, and /health.

The API and the page share one queue. Errors: api_errors.py.
"""

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from chatapp.engine import Chunk, Engine, Sampling
from chatapp.server.api_errors import FAILED, ApiError, ClientGone, as_api_error
from chatapp.server.completion import Completion, event
from chatapp.server.fair_queue import Client, FairQueue, Job
from chatapp.server.openai_schema import ChatRequest, problems
from chatapp.server.stop_sequences import until_stop

T = TypeVar("T")
# Characters per token of a conversation, on average; text in any language has far fewer.
MAX_TOKEN_CHARACTERS = 32
TIMEOUT_BODY = 20  # seconds in which a request's body must arrive
CHAT = "/v1/chat/completions"
MODELS = "/v1/models"
log = logging.getLogger("uvicorn.error")


async def parse(request: Request) -> ChatRequest:
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
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise ApiError(400, *problems(error)) from None


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


class OpenAIApi:
    """The routes for `engines`, by the name of their model; the first one is the default."""

    def __init__(self, engines: Mapping[str, Engine], queue: FairQueue) -> None:
        self._engines = engines
        self._queue = queue
        self._began = int(time.time())
        self.router = APIRouter()
        self.router.add_api_route(CHAT, self.chat_completions, methods=["POST"])
        self.router.add_api_route(MODELS, self.models)
        self.router.add_api_route(MODELS + "/{name}", self.model)
        self.router.add_api_route("/health", self.health)
        every = ["GET", "POST", "PUT", "PATCH", "DELETE"]
        self.router.add_api_route("/v1/{path:path}", self.unknown, methods=every)

    async def chat_completions(self, request: Request, asked: Annotated[ChatRequest, Depends(parse)]) -> Response:
        name = self._known(asked.model)
        completion = Completion(name)
        job = self._join(client_of(request), asked, self._engines[name])
        try:
            chunks = aiter(job)
            if not asked.stream:
                answer = await while_connected(request, collect(chunks))
                job.leave()
                return JSONResponse(completion.complete("".join(chunk.text for chunk in answer), answer[-1]))
            # With the first chunk the model has accepted the messages: only now the status is certain.
            first = await while_connected(request, first_of(chunks))
            with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
            return EventStream(job, events(completion, first, chunks, with_usage))
        except BaseException:
            job.leave()
            raise

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._described(name) for name in self._engines]}

    async def model(self, name: str) -> dict[str, Any]:
        return self._described(self._known(name))

    async def health(self) -> dict[str, Any]:
        running, waiting = self._queue.running, self._queue.waiting
        return {"status": "ok", "models": list(self._engines), "running": running, "waiting": waiting}

    async def unknown(self, request: Request) -> Response:
        known_path = request.url.path in (CHAT, MODELS)
        status, problem = (405, "is not an allowed method") if known_path else (404, "does not exist")
        raise ApiError(status, f"{request.method} {request.url.path[:200]} {problem}")

    def _described(self, name: str) -> dict[str, Any]:
        context = self._engines[name].context_length
        return {"id": name, "object": "model", "created": self._began, "owned_by": "local", "context_length": context}

    def _known(self, name: str | None) -> str:
        if name is None:
            return next(iter(self._engines))
        if name not in self._engines:
            names = ", ".join(self._engines)
            raise ApiError(404, f"there is no model {name[:100]!r}, only: {names}", "model", "model_not_found")
        return name

    def _join(self, client: Client, asked: ChatRequest, engine: Engine) -> Job[Chunk]:
        """Check the request against the model's context, and take a place in the queue for it."""
        context = engine.context_length
        sampling = Sampling(**asked.sampling)
        if sampling.max_tokens > context:
            raise ApiError(400, f"max_tokens: the model's context has {context} tokens", "max_tokens")
        messages = [message.as_dict() for message in asked.messages]
        characters = sum(len(message["content"]) for message in messages)
        limit = MAX_TOKEN_CHARACTERS * context
        if characters > limit:  # refused before it occupies a place in the queue
            raise ApiError(400, f"messages: {characters} characters are too many, at most {limit} fit", "messages")
        if messages[0]["role"] != "system" and (usual := engine.card.get("system_prompt")):
            messages = [{"role": "system", "content": usual}, *messages]  # as in training

        def work(cancel: threading.Event) -> Iterator[Chunk]:
            try:
                yield from until_stop(engine.stream(messages, sampling, cancel), asked.stops)
            except ValueError:
                raise
            except Exception as error:
                log.error("an answer failed", exc_info=error)
                raise ApiError(500, FAILED) from error

        return self._queue.join(client, work)


def client_of(request: Request) -> Client:
    key = request.headers.get("authorization", "")
    address = request.client.host if request.client else ""
    return Client(address, hashlib.sha256(key.encode()).hexdigest() if key else "")


async def collect(chunks: AsyncIterator[Chunk]) -> list[Chunk]:
    return [chunk async for chunk in chunks]


async def first_of(chunks: AsyncIterator[Chunk]) -> Chunk:
    return await anext(chunks)


async def events(
    completion: Completion, first: Chunk, chunks: AsyncIterator[Chunk], include_usage: bool
) -> AsyncIterator[str]:
    """The events of a streamed answer. `first` was taken from `chunks` already."""
    yield event(completion.piece({"role": "assistant", "content": ""}))
    try:
        chunk = first
        while True:
            if chunk.text:
                yield event(completion.piece({"content": chunk.text}))
            if chunk.finish_reason:
                break
            chunk = await anext(chunks)
    except Exception as error:  # the status is sent, so the error becomes an event
        yield event(as_api_error(error).body)
        return
    yield event(completion.piece({}, chunk.finish_reason, dropped_turns=chunk.dropped_turns))
    if include_usage:
        yield event(completion.usage(chunk))
    yield "data: [DONE]\n\n"
