"""Answers that are written at the same time: one step of the model gives the next token of each."""

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from chatapp.engine.decoder import Decoder
from chatapp.engine.json_constraint import JsonConstraint
from chatapp.engine.rows import Row, Rows
from chatapp.engine.sampling import Sampling, choose, scores
from chatapp.engine.token_logprobs import TokenBytes, TokenLogprob, token_logprob

FinishReason = Literal["stop", "length", "cancelled"]
# Tokens of a prompt that are read in one step.
MAX_STEP = 64
MIN_STEP = 16
# The reading between two tokens of the answers ends within a second, because others wait, and an answer can be
# cancelled only there. Two cores read about 60 tokens a second with a model of 1 GB.
TOKENS_TIMES_BYTES = 32e9


def tokens_in_round(model_bytes: int) -> int:
    """How many tokens of prompts a model of this size reads between two tokens of the answers, at least one step."""
    return int(max(MIN_STEP, TOKENS_TIMES_BYTES // max(1, model_bytes)))


def tokens_in_step(model_bytes: int) -> int:
    """How many tokens of a prompt a model of this size reads in one step.

    The model's size decides, not its speed: the same conversation is always read in the same steps, so that it gives
    the same bits on every machine.
    """
    return min(MAX_STEP, tokens_in_round(model_bytes))


def _now() -> float:
    return field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class Begun:
    """The prompt has its place, and `reused` of its tokens were read before."""

    reused: int


@dataclass(frozen=True)
class Token:
    id: int
    logprob: TokenLogprob | None
    at: float = _now()


@dataclass(frozen=True)
class End:
    reason: FinishReason
    at: float = _now()


Event = Begun | Token | End | Exception


@dataclass(eq=False)
class Request:
    """An answer that somebody waits for. `events`: Begun, then Tokens, and last an End or an error."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    constraint: JsonConstraint | None
    cancel: threading.Event
    events: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)
    left: bool = False  # nobody waits any longer
    at: float = _now()


class _Answer:
    """A request with its row."""

    def __init__(self, request: Request, row: Row) -> None:
        self.request = request
        self.row = row
        self.ids: list[int] = []
        self._random = np.random.default_rng(request.sampling.seed)

    def choose(self, logits: np.ndarray) -> int:
        sampling, constraint = self.request.sampling, self.request.constraint
        if constraint is None:
            token = choose(logits, self.ids, sampling, self._random)
        else:
            token = constraint.choose(scores(logits, self.ids, sampling, self._random))
        self.ids.append(token)
        return token


class Batch:
    """The answers of one model. Any thread may add a request; one thread at a time calls `advance`."""

    def __init__(self, decoder: Decoder, model_bytes: int, end_ids: frozenset[int], token_bytes: TokenBytes) -> None:
        self._rows = Rows(decoder)
        self._step, self._round = tokens_in_step(model_bytes), tokens_in_round(model_bytes)
        self._end_ids = end_ids
        self._bytes = token_bytes
        self._added: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._waiting: list[Request] = []
        self._reading: list[_Answer] = []  # their prompts are not read yet
        self._writing: list[_Answer] = []  # each in the decoder's row of this number

    def add(self, request: Request) -> None:
        self._added.put(request)

    @property
    def busy(self) -> bool:
        return bool(not self._added.empty() or self._waiting or self._reading or self._writing)

    def advance(self) -> None:
        """Read a part of the prompts that are not read, and write a token of each answer."""
        try:
            self._forget_unwanted()
            self._admit()
            self._read()
            self._write()
        except Exception as error:
            self._fail(error)

    def _forget_unwanted(self) -> None:
        while not self._added.empty():
            self._waiting.append(self._added.get())
        for request in [request for request in self._waiting if _unwanted(request)]:
            self._waiting.remove(request)
            request.events.put(End("cancelled"))
        for answer in [answer for answer in self._reading if _unwanted(answer.request)]:
            self._reading.remove(answer)
            self._rows.free(answer.row)
            answer.request.events.put(End("cancelled"))
        for answer in [answer for answer in self._writing if _unwanted(answer.request)]:
            self._end(answer, End("cancelled"))

    def _admit(self) -> None:
        while self._waiting:
            request = self._waiting[0]
            row = self._rows.take(request.prompt, request.max_tokens)
            if row is None:
                return
            self._waiting.pop(0)
            self._reading.append(_Answer(request, row))
            request.events.put(Begun(len(row.ids)))

    def _read(self) -> None:
        """A step of the first prompt, and of others that one step completes, as far as a round allows."""
        room = self._round
        for number, answer in enumerate(list(self._reading)):
            left = answer.request.prompt[len(answer.row.ids) :]
            if number == 0 or len(left) <= min(self._step, room):
                room -= min(len(left), self._step)
                self._read_step(answer, left)

    def _read_step(self, answer: _Answer, left: list[int]) -> None:
        try:
            logits = self._rows.read(answer.row, left[: self._step])
        except Exception as error:  # of this prompt alone
            self._reading.remove(answer)
            self._rows.drop(answer.row)
            answer.request.events.put(error)
            return
        if len(left) <= self._step:
            self._reading.remove(answer)
            self._rows.place(answer.row, len(self._writing))
            self._writing.append(answer)
            self._choose([answer], logits[np.newaxis])

    def _write(self) -> None:
        if self._writing:
            logits = self._rows.step([answer.ids[-1] for answer in self._writing])
            self._choose(list(self._writing), logits)

    def _choose(self, answers: Sequence[_Answer], logits: np.ndarray) -> None:
        """Choose the next token of each answer by its row of `logits`."""
        for answer, each in zip(answers, logits, strict=True):
            sampling = answer.request.sampling
            try:
                token = answer.choose(each)
                logprob = None if sampling.logprobs is None else self._logprob(each, token, sampling.logprobs)
            except Exception as error:  # of this answer alone
                self._end(answer, error)
                continue
            if token in self._end_ids:
                self._end(answer, End("stop"))
                continue
            answer.request.events.put(Token(token, logprob))
            if len(answer.ids) == answer.request.max_tokens:
                self._end(answer, End("length"))

    def _logprob(self, logits: np.ndarray, token: int, top: int) -> TokenLogprob:
        return token_logprob(logits, token, top, self._bytes)

    def _end(self, answer: _Answer, event: Event) -> None:
        last = self._writing[-1]
        self._rows.place(last.row, answer.row.at)  # the rows of the others stay without a gap
        self._writing[self._writing.index(answer)] = last
        self._writing.pop()
        self._rows.free(answer.row)
        answer.request.events.put(event)

    def _fail(self, error: Exception) -> None:
        """All answers end with this error, because nobody knows what a failed step has read."""
        requests = [*self._waiting, *(answer.request for answer in [*self._reading, *self._writing])]
        for request in requests:
            request.events.put(error)
        for answers in (self._waiting, self._reading, self._writing):
            answers.clear()
        self._rows.clear()


def _unwanted(request: Request) -> bool:
    return request.left or request.cancel.is_set()


class Worker:
    """The thread that computes, for all models in turn. It lives as long as a batch is busy."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._batches: list[Batch] = []  # that are busy; without one, there is no thread

    def start(self, batch: Batch) -> None:
        """Work on `batch`, to which a request was added, until it is no longer busy."""
        with self._lock:
            if not self._batches:
                threading.Thread(target=self._work, name="model").start()
            if batch not in self._batches:
                self._batches.append(batch)

    def _work(self) -> None:
        try:
            while batches := self._busy():
                for batch in batches:
                    batch.advance()
        except BaseException:
            with self._lock:
                self._batches.clear()  # the next request starts another thread
            raise

    def _busy(self) -> list[Batch]:
        with self._lock:
            self._batches = [batch for batch in self._batches if batch.busy]
            return list(self._batches)
