"""One exported model in memory, which answers conversations piece by piece."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from chatapp.engine.exported_model import load_exported
from chatapp.engine.prompt import Message
from chatapp.engine.prompt_cache import KeptGenerator, PromptCache, tokens_in_step
from chatapp.engine.sampling import Sampling, choose
from chatapp.engine.text_stream import TextStream

MODELS = ("tuned", "base")  # the chat uses the first one that exists
FinishReason = Literal["stop", "length", "cancelled"]
# The prompt is cut so that max_tokens are left for the answer, but at most this share of the context.
MAX_ANSWER_SHARE = 1 / 4


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer. Only the last one has a finish_reason."""

    text: str  # the new text; all pieces joined are the answer
    tokens: int  # tokens of the answer so far
    finish_reason: FinishReason | None
    dropped_turns: int = 0  # oldest turns of the conversation that did not fit the context
    prompt_tokens: int = 0  # tokens of the prompt that the model read
    reused_tokens: int = 0  # prompt tokens that came from the cache


class Engine:
    """One exported model. Threads may share it: it gives one answer at a time, and the other threads wait.

    `folder` holds what the export stage wrote; `threads` is the number of CPUs to compute on (None: all usable ones).
    Raises FileNotFoundError when a file of the model is missing, ValueError when one is damaged.
    """

    card: dict[str, Any]
    context_length: int

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        model = load_exported(Path(folder), threads)
        self.card = model.card
        self.context_length = model.context_length
        self._prompt = model.prompt
        self._end_ids = model.end_ids
        self._cache = PromptCache(model.session, model.context_length, tokens_in_step(model.size))
        self._lock = threading.Lock()

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """The ids of a complete conversation up to where the answer begins, as in training."""
        return self._prompt.ids(messages)

    def stream(
        self, messages: list[Message], sampling: Sampling | None = None, cancel: threading.Event | None = None
    ) -> Iterator[Chunk]:
        """The answer to `messages` (each with a role and a content; the last one is the user's), piece by piece.

        A conversation longer than the context loses its oldest turns. Another thread may set `cancel`: the answer then
        ends at the next token, or before its first one. The engine is free again after the last chunk, or when the
        iterator is closed. Raises ValueError, before the first chunk, when `messages` is no conversation or its last
        turn is too long.
        """
        sampling = sampling or Sampling()
        room = min(sampling.max_tokens, max(1, int(self.context_length * MAX_ANSWER_SHARE)))
        ids, dropped = self._prompt.fit(messages, self.context_length, room)
        return self._answer(ids, dropped, sampling, cancel or threading.Event())

    def _answer(self, ids: list[int], dropped: int, sampling: Sampling, cancel: threading.Event) -> Iterator[Chunk]:
        cancelled = Chunk("", 0, "cancelled", dropped, len(ids))
        while not self._lock.acquire(timeout=0.05):
            if cancel.is_set():
                yield cancelled
                return
        try:
            max_tokens = min(sampling.max_tokens, self.context_length - len(ids))
            generator, reused = self._cache.prepare(ids, max_tokens, cancel)
            if generator is None:
                yield replace(cancelled, reused_tokens=reused)
                return
            try:
                for text, tokens, finish in self._generate(generator, max_tokens, sampling, cancel):
                    yield Chunk(text, tokens, finish, dropped, len(ids), reused)
            except Exception:
                generator = None  # nobody knows what it has read
                raise
            finally:
                if generator is not None:
                    self._cache.keep(generator)
        finally:
            self._lock.release()

    def _generate(
        self, generator: KeptGenerator, max_tokens: int, sampling: Sampling, cancel: threading.Event
    ) -> Iterator[tuple[str, int, FinishReason | None]]:
        """New text, tokens so far and the finish reason, for each token that completes a character."""
        text = TextStream(self._prompt.tokenizer)
        random = np.random.default_rng(sampling.seed)
        finish: FinishReason | None = None
        for tokens in range(max_tokens + 1):
            if cancel.is_set():
                finish = "cancelled"
            elif tokens == max_tokens:
                finish = "length"
            else:
                token = choose(generator.logits(), np.array(generator.ids), sampling, random)
                finish = "stop" if token in self._end_ids else None
            piece = text.finish() if finish else text.add(token)
            if piece or finish:
                yield piece, tokens + (not finish), finish
            if finish:
                return
            generator.read([token])


def load_engines(folder: Path) -> dict[str, Engine]:
    """The exported models in `folder`, by name.

    Raises FileNotFoundError when there is none, ValueError when one is damaged.
    """
    found = [name for name in MODELS if (folder / name).is_dir()]
    if not found:
        raise FileNotFoundError(f"{folder} holds no exported model ({' or '.join(MODELS)})")
    return {name: Engine(folder / name) for name in found}
