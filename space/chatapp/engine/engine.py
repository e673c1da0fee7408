"""One exported model in memory, which answers conversations piece by piece."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from chatapp.engine.conversation import Message
from chatapp.engine.exported_model import load_exported
from chatapp.engine.generators import KeptGenerator
from chatapp.engine.prompt_cache import PromptCache, tokens_in_step
from chatapp.engine.sampling import Sampling
from chatapp.engine.text_stream import TextStream
from chatapp.engine.token_logprobs import TokenBytes, TokenLogprob, token_logprob

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
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens that completed the text, if they were asked for


@dataclass(frozen=True)
class _Prompt:
    ids: list[int]
    dropped_turns: int = 0
    is_chat: bool = True  # otherwise a text that goes on, with its white space


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
        self._repetition_penalty = model.repetition_penalty
        self._cache = PromptCache(model.session, model.context_length, tokens_in_step(model.size))
        self._bytes = TokenBytes(model.prompt.tokenizer)
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
        ids, dropped = self._prompt.fit(messages, self.context_length, self._room(sampling))
        return self._answer(_Prompt(ids, dropped), sampling, cancel or threading.Event())

    def complete(
        self, text: str, sampling: Sampling | None = None, cancel: threading.Event | None = None
    ) -> Iterator[Chunk]:
        """How `text` goes on, without a chat template. Otherwise as `stream`.

        Raises ValueError, before the first chunk, when `text` is empty or too long.
        """
        sampling = sampling or Sampling()
        ids, room = self._prompt.text_ids(text), self._room(sampling)
        if not ids:
            raise ValueError("the prompt must have at least one token")
        if len(ids) > self.context_length - room:
            raise ValueError(
                f"the prompt is too long: it has {len(ids)} tokens. The model reads {self.context_length} tokens, and "
                f"{room} of these are reserved for the answer"
            )
        return self._answer(_Prompt(ids, is_chat=False), sampling, cancel or threading.Event())

    def _room(self, sampling: Sampling) -> int:
        """Tokens that are reserved for the answer."""
        return min(sampling.max_tokens, max(1, int(self.context_length * MAX_ANSWER_SHARE)))

    def _answer(self, prompt: _Prompt, sampling: Sampling, cancel: threading.Event) -> Iterator[Chunk]:
        count = len(prompt.ids)
        if sampling.repetition_penalty is None:  # JSON repeats its marks by rule
            own = 1 if sampling.json_object else self._repetition_penalty
            sampling = replace(sampling, repetition_penalty=own)
        blank = Chunk("", 0, None, prompt.dropped_turns, count)
        while not self._lock.acquire(timeout=0.05):
            if cancel.is_set():
                yield replace(blank, finish_reason="cancelled")
                return
        try:
            max_tokens = min(sampling.max_tokens, self.context_length - count)
            generator, reused = self._cache.prepare(prompt.ids, max_tokens, cancel, sampling.json_object)
            blank = replace(blank, reused_tokens=reused)
            if generator is None:
                yield replace(blank, finish_reason="cancelled")
                return
            text = TextStream(self._prompt.tokenizer, None if prompt.is_chat else prompt.ids[-1])
            try:
                for piece in self._generate(generator, text, max_tokens, sampling, cancel):
                    yield replace(blank, **piece)
            except Exception:
                generator = None  # nobody knows what it has read
                raise
            finally:
                if generator is not None:
                    self._cache.keep(generator)
        finally:
            self._lock.release()

    def _generate(
        self,
        generator: KeptGenerator,
        text: TextStream,
        max_tokens: int,
        sampling: Sampling,
        cancel: threading.Event,
    ) -> Iterator[dict[str, Any]]:
        """What is new in a chunk, for each token that completes a character, and for the end."""
        random = np.random.default_rng(sampling.seed)
        finish: FinishReason | None = None
        logprobs: list[TokenLogprob] = []  # of tokens whose text is not given yet
        for tokens in range(max_tokens + 1):
            if cancel.is_set():
                finish = "cancelled"
            elif tokens == max_tokens:
                finish = "length"
            else:
                logits = generator.logits()
                token = generator.choose(logits, sampling, random)
                finish = "stop" if token in self._end_ids else None
                if sampling.logprobs is not None and not finish:
                    logprobs.append(token_logprob(logits, token, sampling.logprobs, self._bytes))
            piece = text.finish() if finish else text.add(token)
            if piece or finish:
                new = {"text": piece, "tokens": tokens + (not finish), "finish_reason": finish}
                yield {**new, "logprobs": tuple(logprobs)}
                logprobs.clear()
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
