"""The objects of /v1/completions: https://platform.openai.com/docs/api-reference/completions/object"""

from collections.abc import Iterator, Sequence
from typing import Any

from chatapp.engine import Chunk
from chatapp.server.completion import Choice, head, logprobs_of, readable, text_of, usage


class TextCompletion:
    """How `prompts` go on, `count` times each. `echo`: a text begins with its prompt."""

    def __init__(self, model: str, prompts: Sequence[str], count: int, logprobs: bool, echo: bool) -> None:
        self._head = {**head("cmpl", model), "object": "text_completion"}
        self._count = count
        self._logprobs = logprobs
        self._echoed = [prompt if echo else "" for prompt in prompts for _ in range(count)]
        self._written = [0] * len(self._echoed)  # characters of each streamed text so far

    def complete(self, choices: Sequence[Choice]) -> dict[str, Any]:
        texts = [echoed + text_of(chunks) for echoed, chunks in zip(self._echoed, choices, strict=True)]
        found = [
            self._choice(index, texts[index], self._logprobs_of(chunks, 0), chunks[-1].finish_reason)
            for index, chunks in enumerate(choices)
        ]
        ends = [chunks[-1] for chunks in choices]
        return {**self._head, "choices": found, "usage": usage(ends, self._count)}

    def first(self) -> Iterator[dict[str, Any]]:
        for index, echoed in enumerate(self._echoed):
            if echoed:
                yield self._piece(index, echoed, None)

    def pieces(self, index: int, chunk: Chunk) -> Iterator[dict[str, Any]]:
        if chunk.text or chunk.logprobs or chunk.finish_reason:
            logprobs = self._logprobs_of([chunk], self._written[index])
            self._written[index] += len(chunk.text)
            yield self._piece(index, chunk.text, logprobs, chunk.finish_reason)

    def usage(self, ends: Sequence[Chunk]) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage(ends, self._count)}

    def _piece(
        self, index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        return {**self._head, "choices": [self._choice(index, text, logprobs, finish_reason)]}

    def _choice(
        self, index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs_of(self, chunks: Choice, start: int) -> dict[str, Any] | None:
        """`start`: characters of the text before these chunks."""
        if not self._logprobs:
            return None
        said = logprobs_of(chunks)
        tokens = [readable(each) for each in said]
        offsets = [start + sum(map(len, tokens[:i])) for i in range(len(tokens))]
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob for each in said],
            "top_logprobs": [{readable(top): top.logprob for top in each.top} for each in said],
            "text_offset": offsets,
        }
