"""The objects of an answer in OpenAI's shape: https://platform.openai.com/docs/api-reference/chat/object

A request may ask for several answers: the choices.
"""

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from chatapp.engine import Chunk, TokenLogprob

Choice = list[Chunk]  # all chunks of one answer


class Shape(Protocol):
    """How answers are written: `complete` as one object, `first`, `piece` and `usage` as the objects of a stream."""

    def complete(self, choices: Sequence[Choice]) -> dict[str, Any]: ...

    def first(self) -> Iterator[dict[str, Any]]: ...

    def pieces(self, index: int, chunk: Chunk) -> Iterator[dict[str, Any]]: ...

    def usage(self, ends: Sequence[Chunk]) -> dict[str, Any]: ...


class ChatCompletion:
    """`count` answers of `model` to one conversation."""

    def __init__(self, model: str, count: int = 1, logprobs: bool = False) -> None:
        self._head = head("chatcmpl", model)
        self._count = count
        self._logprobs = logprobs

    def complete(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(index, chunks) for index, chunks in enumerate(choices)],
            "usage": usage([chunks[-1] for chunks in choices], self._count),
            "dropped_turns": choices[0][-1].dropped_turns,
        }

    def first(self) -> Iterator[dict[str, Any]]:
        for index in range(self._count):
            yield self._piece(index, {"role": "assistant", "content": ""})

    def pieces(self, index: int, chunk: Chunk) -> Iterator[dict[str, Any]]:
        if chunk.text or chunk.logprobs:
            yield self._piece(index, {"content": chunk.text}, logprobs=self._logprobs_of([chunk]))
        if chunk.finish_reason:
            end = self._piece(index, {}, finish_reason=chunk.finish_reason)
            yield {**end, "dropped_turns": chunk.dropped_turns}

    def usage(self, ends: Sequence[Chunk]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(ends, self._count)}

    def _choice(self, index: int, chunks: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": text_of(chunks), "refusal": None}
        logprobs = self._logprobs_of(chunks)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": chunks[-1].finish_reason}

    def _piece(self, index: int, delta: dict[str, str], **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs_of(self, chunks: Choice) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        tokens = [{**_token(each), "top_logprobs": [_token(top) for top in each.top]} for each in logprobs_of(chunks)]
        return {"content": tokens, "refusal": None}


def _token(said: TokenLogprob) -> dict[str, Any]:
    return {"token": readable(said), "logprob": said.logprob, "bytes": list(said.token)}


def readable(said: TokenLogprob) -> str:
    """A token as text. One that is a part of a character shows the replacement character."""
    return said.token.decode("utf-8", errors="replace")


def head(prefix: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


def text_of(chunks: Choice) -> str:
    return "".join(chunk.text for chunk in chunks)


def logprobs_of(chunks: Choice) -> list[TokenLogprob]:
    return [each for chunk in chunks for each in chunk.logprobs]


def usage(ends: Sequence[Chunk], per_prompt: int = 1) -> dict[str, Any]:
    """The tokens of several answers, `per_prompt` to each prompt, by their last chunks. A prompt counts once."""
    firsts = ends[::per_prompt]
    prompt, written = sum(end.prompt_tokens for end in firsts), sum(end.tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": sum(end.reused_tokens for end in firsts)},
    }


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
