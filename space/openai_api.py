"""The OpenAI-style API: /v1/chat/completions (stream and not) and /v1/models; errors in OpenAI's shape.

It shares the line before the model with the page.
"""

import asyncio
import hashlib
import json
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from typing import Any, TypeVar

from engine import Chunk, Engine, Sampling
from fair_queue import Busy, Client, FairQueue, Job
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from limits import TooLarge
from openai_schema import ChatRequest, problems
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send
from stop_sequences import until_stop

T = TypeVar("T")
LONGEST_TOKEN = 32  # characters; on average of a conversation's tokens, far more than of any language
SLOWEST_BODY = 20  # seconds in which a request must have arrived
log = logging.getLogger("uvicorn.error")


class ApiError(Exception):
    """An error as OpenAI words it: https://platform.openai.com/docs/guides/error-codes"""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = {429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = {"Retry-After": str(retry_after)} if retry_after else None

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="server_busy", retry_after=error.retry_after)
    if isinstance(error, ValueError):  # the engine's word for a conversation that it cannot answer
        return ApiError(400, str(error), "messages")
    log.error("an answer failed", exc_info=error)
    return ApiError(500, "the server failed at this request; its log says why")


class ClientGone(Exception):
    """The client closed the connection: nobody reads an answer."""


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; it is cancelled, and ClientGone raised, when the client goes away before. The request's
    body must have been read."""

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
    """Server-sent events of a job, which is left however the response ends."""

    def __init__(self, job: Job, events: AsyncIterator[str]) -> None:
        # X-Accel-Buffering: or a proxy may collect the pieces.
        super().__init__(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.leave()


class Completion:
    """The objects of one answer: https://platform.openai.com/docs/api-reference/chat/object"""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, last: Chunk) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": last.finish_reason}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(last),
            "dropped_turns": last.dropped_turns,
        }

    def piece(self, delta: dict[str, str], finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **more}

    def usage(self, last: Chunk) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(last)}


def usage(last: Chunk) -> dict[str, Any]:
    return {
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.tokens,
        "total_tokens": last.prompt_tokens + last.tokens,
        "prompt_tokens_details": {"cached_tokens": last.reused_tokens},
    }


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def parse(request: Request) -> ChatRequest:
    # Also keeps other sites' pages out: a browser sends this type across origins only where it is allowed to.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the Content-Type must be application/json")
    try:
        async with asyncio.timeout(SLOWEST_BODY):
            body = await request.body()
    except TimeoutError:
        raise ApiError(408, f"the request took longer than {SLOWEST_BODY} s to arrive") from None
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise ApiError(400, *problems(error)) from None


def client_of(request: Request) -> Client:
    key = request.headers.get("authorization", "")
    address = request.client.host if request.client else ""
    return Client(address, hashlib.sha256(key.encode()).hexdigest() if key else "")


def routes(engines: Mapping[str, Engine], queue: FairQueue) -> APIRouter:
    """`engines` by the name of their model; the first is the default."""
    router = APIRouter()
    began = int(time.time())

    def described(name: str) -> dict[str, Any]:
        context = engines[name].context_length
        return {"id": name, "object": "model", "created": began, "owned_by": "local", "context_length": context}

    def known(name: str | None) -> str:
        if name is None:
            return next(iter(engines))
        if name not in engines:
            have = ", ".join(engines)
            raise ApiError(404, f"there is no model {name[:100]!r}, only: {have}", "model", "model_not_found")
        return name

    def enter(request: Request, asked: ChatRequest, engine: Engine) -> Job[Chunk]:
        sampling = Sampling(**asked.sampling)
        if sampling.max_tokens > engine.context_length:
            raise ApiError(400, f"max_tokens: the model's context has {engine.context_length} tokens", "max_tokens")
        messages = [message.as_dict() for message in asked.messages]
        letters = sum(len(message["content"]) for message in messages)
        if letters > (most := LONGEST_TOKEN * engine.context_length):  # before it takes a place in the line
            raise ApiError(400, f"messages: {letters} characters are too long, more than {most}", "messages")
        if messages[0]["role"] != "system" and (usual := engine.card.get("system_prompt")):
            messages = [{"role": "system", "content": usual}, *messages]  # as in training

        def work(cancel: threading.Event) -> Iterator[Chunk]:
            return until_stop(engine.stream(messages, sampling, cancel), asked.stops)

        return queue.join(client_of(request), work)

    async def events(
        completion: Completion, first: list[Chunk], chunks: AsyncIterator[Chunk], include_usage: bool
    ) -> AsyncIterator[str]:
        yield event(completion.piece({"role": "assistant", "content": ""}))
        try:
            chunk = first[0]
            while True:
                if chunk.text:
                    yield event(completion.piece({"content": chunk.text}))
                if chunk.finish_reason:
                    break
                chunk = await anext(chunks)
        except Exception as error:  # too late for a status
            yield event(as_api_error(error).body)
            return
        yield event(completion.piece({}, chunk.finish_reason, dropped_turns=chunk.dropped_turns))
        if include_usage:
            yield event(completion.usage(chunk))
        yield "data: [DONE]\n\n"

    async def complete(request: Request) -> Response:
        asked = await parse(request)
        model = known(asked.model)
        completion = Completion(model)
        job = enter(request, asked, engines[model])
        try:
            chunks = aiter(job)
            if not asked.stream:
                answer = await while_connected(request, collect(chunks))
                job.leave()
                return JSONResponse(completion.whole("".join(chunk.text for chunk in answer), answer[-1]))
            # The status is sent only now, when the model has accepted the messages.
            first = await while_connected(request, collect(chunks, 1))
            with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
            return EventStream(job, events(completion, first, chunks, with_usage))
        except BaseException:
            job.leave()
            raise

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        try:
            return await complete(request)
        except (ClientGone, ClientDisconnect):
            return Response(status_code=499)  # as nginx logs it; nobody reads it
        except TooLarge:
            raise
        except Exception as error:
            return as_api_error(error).response()

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(name) for name in engines]}

    @router.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        try:
            return JSONResponse(described(known(name)))
        except ApiError as error:
            return error.response()

    @router.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "models": list(engines), "running": queue.running, "waiting": queue.waiting}

    @router.api_route("/v1/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    async def unknown(request: Request) -> Response:
        known_path = request.url.path in ("/v1/chat/completions", "/v1/models")
        status, what = (405, "cannot be used so") if known_path else (404, "does not exist")
        return ApiError(status, f"{request.method} {request.url.path[:200]} {what}").response()

    return router


async def collect(chunks: AsyncIterator[Chunk], most: int | None = None) -> list[Chunk]:
    collected: list[Chunk] = []
    async for chunk in chunks:
        collected.append(chunk)
        if len(collected) == most:
            break
    return collected
