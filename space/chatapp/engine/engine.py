"""One exported model in memory, which answers conversations piece by piece."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chatapp.engine.batch import Batch, Begun, End, FinishReason, Request, Token, Worker
from chatapp.engine.conversation import Message
from chatapp.engine.exported_model import load_exported
from chatapp.engine.json_constraint import JsonGrammar
from chatapp.engine.sampling import Sampling
from chatapp.engine.text_stream import TextStream
from chatapp.engine.token_logprobs import TokenBytes, TokenLogprob

MODELS = ("tuned", "base")  # the chat uses the first one that exists
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
    seconds: float = 0.0  # from the request until its last token was made


@dataclass(frozen=True)
class _Prompt:
    ids: list[int]
    dropped_turns: int = 0
    is_chat: bool = True  # otherwise a text that goes on, with its white space


class Engine:
    """One exported model. Threads may share it: their answers are written at the same time.

    `folder` holds what the export stage wrote; `threads` is the number of CPUs to compute on (None: all usable ones);
    models with the same `worker` take turns. An answer is the same whatever other answers are written beside it.
    Raises FileNotFoundError when a file of the model is missing, ValueError when one is damaged.
    """

    card: dict[str, Any]
    context_length: int

    def __init__(self, folder: Path, threads: int | None = None, worker: Worker | None = None) -> None:
        model = load_exported(Path(folder), threads)
        self.card = model.card
        self.context_length = model.context_length
        self._prompt = model.prompt
        self._repetition_penalty = model.repetition_penalty
        self._grammar = JsonGrammar(Path(folder), model.decoder.vocabulary, model.end_ids)
        token_bytes = TokenBytes(model.prompt.tokenizer)
        self._batch = Batch(model.decoder, model.size, model.end_ids, token_bytes)
        self._worker = worker or Worker()

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """The ids of a complete conversation up to where the answer begins, as in training."""
        return self._prompt.ids(messages)

    def stream(
        self, messages: list[Message], sampling: Sampling | None = None, cancel: threading.Event | None = None
    ) -> Iterator[Chunk]:
        """The answer to `messages` (each with a role and a content; the last one is the user's), piece by piece.

        A conversation longer than the context loses its oldest turns. The answer ends at the next token, or before its
        first one, when another thread sets `cancel` or the iterator is closed. Raises ValueError, before the first
        chunk, when `messages` is no conversation or its last turn is too long.
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
        request = self._ask(prompt, sampling, cancel)
        chunk = Chunk("", 0, None, prompt.dropped_turns, len(prompt.ids))
        text = TextStream(self._prompt.tokenizer, None if prompt.is_chat else prompt.ids[-1])
        logprobs: list[TokenLogprob] = []  # of tokens whose text is not given yet
        try:
            while chunk.finish_reason is None:
                event = request.events.get()
                event = End("cancelled") if cancel.is_set() else event
                match event:
                    case Begun(reused):
                        chunk = replace(chunk, reused_tokens=reused)
                        continue
                    case Token(token, logprob):
                        logprobs += [logprob] if logprob else []
                        chunk = replace(chunk, text=text.add(token), tokens=chunk.tokens + 1)
                    case End(reason):
                        chunk = replace(chunk, text=text.finish(), finish_reason=reason)
                    case error:  # no fault of the messages, whatever its type
                        raise RuntimeError(f"the model failed: {error}") from error
                chunk = replace(chunk, seconds=event.at - request.at)
                if chunk.text or chunk.finish_reason:
                    yield replace(chunk, logprobs=tuple(logprobs))
                    logprobs.clear()
        finally:
            request.left = True

    def _ask(self, prompt: _Prompt, sampling: Sampling, cancel: threading.Event) -> Request:
        if sampling.repetition_penalty is None:  # JSON repeats its marks by rule
            own = 1 if sampling.json_object else self._repetition_penalty
            sampling = replace(sampling, repetition_penalty=own)
        max_tokens = min(sampling.max_tokens, self.context_length - len(prompt.ids))
        constraint = self._grammar.begin() if sampling.json_object else None
        request = Request(prompt.ids, max_tokens, sampling, constraint, cancel)
        self._batch.add(request)
        self._worker.start(self._batch)
        return request


def load_engines(folder: Path) -> dict[str, Engine]:
    """The exported models in `folder`, by name.

    Raises FileNotFoundError when there is none, ValueError when one is damaged.
    """
    found = [name for name in MODELS if (folder / name).is_dir()]
    if not found:
        raise FileNotFoundError(f"{folder} holds no exported model ({' or '.join(MODELS)})")
    worker = Worker()
    return {name: Engine(folder / name, worker=worker) for name in found}
