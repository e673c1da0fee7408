"""The OpenAI-style API: /v1/chat/completions and /v1/completions (streamed or not), /v1/models, and /health.

The API and the page share one queue. Errors: api_errors.py.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from chatapp.engine import CannotConstrain, Chunk, Engine, Sampling
from chatapp.engine.conversation import MAX_TOKEN_CHARACTERS, characters_that_stay
from chatapp.server.access import Access
from chatapp.server.answering import (
    EventStream,
    Numbered,
    client_of,
    collect,
    events,
    first_of,
    in_turn,
    parse,
    while_connected,
)
from chatapp.server.api_errors import FAILED, ApiError
from chatapp.server.completion import ChatCompletion, Shape
from chatapp.server.fair_queue import FairQueue, Job
from chatapp.server.openai_schema import AnyRequest, ChatRequest, CompletionRequest
from chatapp.server.text_completion import TextCompletion

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MODELS = "/v1/models"
EVERY = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
# Where clients ask whose base URL lacks /v1. Without these, the page would answer.
WITHOUT_VERSION = ("/chat/completions", "/completions", "/models", "/embeddings", "/responses")
Streaming = Callable[[Sampling, threading.Event], Iterator[Chunk]]  # one answer of the engine
log = logging.getLogger("uvicorn.error")


async def chat_request(request: Request) -> ChatRequest:
    return await parse(request, ChatRequest)


async def completion_request(request: Request) -> CompletionRequest:
    return await parse(request, CompletionRequest)


class OpenAIApi:
    """The routes for `engines`, by the name of their model; the first one is the default."""

    def __init__(self, engines: Mapping[str, Engine], queue: FairQueue, access: Access | None = None) -> None:
        self._engines = engines
        self._queue = queue
        self._began = int(time.time())
        self.router = APIRouter()
        api = APIRouter(dependencies=[Depends((access or Access()).check_key)])
        api.add_api_route(CHAT, self.chat_completions, methods=["POST"])
        api.add_api_route(COMPLETIONS, self.completions, methods=["POST"])
        api.add_api_route(MODELS, self.models)
        api.add_api_route(MODELS + "/{name:path}", self.model)
        for path in ("/v1", "/v1/{path:path}", *WITHOUT_VERSION):
            api.add_api_route(path, self.unknown, methods=EVERY)
        self.router.include_router(api)
        self.router.add_api_route("/health", self.health)

    async def chat_completions(
        self, request: Request, asked: Annotated[ChatRequest, Depends(chat_request)]
    ) -> Response:
        name = self._known(asked.model)
        engine = self._engines[name]
        messages = asked.conversation
        self._check_length(engine, characters_that_stay(messages), "messages")
        if (not messages or messages[0]["role"] != "system") and (usual := engine.card.get("system_prompt")):
            messages = [{"role": "system", "content": usual}, *messages]  # as in training

        def stream(sampling: Sampling, cancel: threading.Event) -> Iterator[Chunk]:
            return engine.stream(messages, sampling, cancel)

        shape = ChatCompletion(name, asked.n or 1, bool(asked.logprobs))
        return await self._respond(request, asked, engine, shape, [stream])

    async def completions(
        self, request: Request, asked: Annotated[CompletionRequest, Depends(completion_request)]
    ) -> Response:
        name = self._known(asked.model)
        engine = self._engines[name]

        def going_on(prompt: str) -> Streaming:
            self._check_length(engine, len(prompt), "prompt")
            return lambda sampling, cancel: engine.complete(prompt, sampling, cancel)

        streams = [going_on(prompt) for prompt in asked.prompts]
        shape = TextCompletion(name, asked.prompts, asked.n or 1, asked.logprobs is not None, bool(asked.echo))
        return await self._respond(request, asked, engine, shape, streams)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._described(name) for name in self._engines]}

    async def model(self, name: str) -> dict[str, Any]:
        return self._described(self._known(name))

    async def health(self) -> dict[str, Any]:
        running, waiting = self._queue.running, self._queue.waiting
        return {"status": "ok", "models": list(self._engines), "running": running, "waiting": waiting}

    async def unknown(self, request: Request) -> Response:
        path = request.url.path
        if path in WITHOUT_VERSION:
            raise ApiError(404, f"{request.method} {path} does not exist: the API's base URL ends with /v1")
        known_path = path in (CHAT, COMPLETIONS, MODELS)
        status, problem = (405, "is not an allowed method") if known_path else (404, "does not exist")
        raise ApiError(status, f"{request.method} {path[:200]} {problem}")

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

    def _check_length(self, engine: Engine, characters: int, field: str) -> None:
        """Refuse what no model could read before it occupies a place in the queue."""
        limit = MAX_TOKEN_CHARACTERS * engine.context_length
        if characters > limit:
            raise ApiError(400, f"{field}: {characters} characters are too many, at most {limit} fit", field)

    async def _respond(
        self, request: Request, asked: AnyRequest, engine: Engine, shape: Shape, streams: list[Streaming]
    ) -> Response:
        """Take a place in the queue, and answer each of `streams` `n` times."""
        count = len(streams) * (asked.n or 1)
        job = self._join(request, asked, engine, streams)
        try:
            chunks = aiter(job)
            if not asked.stream:
                choices = await while_connected(request, collect(chunks, count))
                job.leave()
                return JSONResponse(shape.complete(choices))
            # With the first chunk the model has accepted the messages: only now the status is certain.
            first = await while_connected(request, first_of(chunks))
            with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
            return EventStream(job, events(shape, first, chunks, count, with_usage))
        except BaseException:
            job.leave()
            raise

    def _join(self, request: Request, asked: AnyRequest, engine: Engine, streams: list[Streaming]) -> Job[Numbered]:
        context = engine.context_length
        sampling = Sampling(**asked.sampling)
        if sampling.max_tokens > context:
            raise ApiError(400, f"max_tokens: the model's context has {context} tokens", "max_tokens")
        field = "messages" if isinstance(asked, ChatRequest) else "prompt"

        def work(cancel: threading.Event) -> Iterator[Numbered]:
            each = [(stream, nth(sampling, i)) for stream in streams for i in range(asked.n or 1)]
            try:
                yield from in_turn([partial(stream, wanted, cancel) for stream, wanted in each], asked.stops)
            except CannotConstrain as error:
                raise ApiError(400, f"response_format: {error}", "response_format") from None
            except ValueError as error:
                raise ApiError(400, str(error), field) from None
            except Exception as error:
                log.error("an answer failed", exc_info=error)
                raise ApiError(500, FAILED) from error

        return self._queue.join(client_of(request), work)


def nth(sampling: Sampling, number: int) -> Sampling:
    """The sampling of the answer of this number to the same prompt: another seed, otherwise all would be the same."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + number)
