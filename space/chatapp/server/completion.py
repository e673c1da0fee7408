"""The objects of one answer in OpenAI's shape: https://platform.openai.com/docs/api-reference/chat/object"""

import json
import time
import uuid
from typing import Any

from chatapp.engine import Chunk


class Completion:
    """The answer of `model` as one object, or as the objects of a stream."""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def complete(self, text: str, last: Chunk) -> dict[str, Any]:
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
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
