"""Answers that are written at the same time: one step of the model gives the next token of each."""

import queue
import threading
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
MAX_STEP = 32
MIN_STEP = 16
# A step ends within a second, because an answer can be cancelled only between steps. Two cores read about 60 tokens a
# second with a model of 1 GB.
TOKENS_TIMES_BYTES = 32e9
# Prompts that may read between two tokens of the answers: more would stop these for too long.
PROMPTS_IN_A_ROUND = 8


def tokens_in_step(model_bytes: int) -> int:
    """How many tokens a model of this size reads in one step.

    The model's size decides, not its speed: the same conversation is always read in the same steps, so that it gives
    the same bits on every machine.
    """
    return int(min(MAX_STEP, max(MIN_STEP, TOKENS_TIMES_BYTES // max(1, model_bytes))))


@dataclass(frozen=True)
class Begun:
    """The prompt has its place, and `reused` of its tokens were read before."""

    reused: int


@dataclass(frozen=True)
class Token:
    id: int
    logprob: TokenLogprob | None


@dataclass(frozen=True)
class End:
    reason: FinishReason


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

    def __init__(self, decoder: Decoder, step: int, end_ids: frozenset[int], token_bytes: TokenBytes) -> None:
        self._rows = Rows(decoder)
        self._step = step
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
        """A step of the first prompt, and of others that one step completes."""
        for number, answer in enumerate(self._reading[:PROMPTS_IN_A_ROUND]):
            left = answer.request.prompt[len(answer.row.ids) :]
            if number == 0 or len(left) <= self._step:
                logits = self._rows.read(answer.row, left[: self._step])
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
            try:
                self._tell(answer, each)
            except Exception as error:  # of this answer alone
                self._end(answer, error)

    def _tell(self, answer: _Answer, logits: np.ndarray) -> None:
        request, token = answer.request, answer.choose(logits)
        if token in self._end_ids:
            self._end(answer, End("stop"))
            return
        top = request.sampling.logprobs
        request.events.put(Token(token, None if top is None else token_logprob(logits, token, top, self._bytes)))
        if len(answer.ids) == request.max_tokens:
            self._end(answer, End("length"))

    def _end(self, answer: _Answer, event: Event) -> None:
        last = self._writing[-1]
        self._rows.place(last.row, answer.row.at)  # the rows of the others stay without a gap
        self._writing[self._writing.index(answer)] = last
        self._writing.pop()
        self._rows.free(answer.row)
        answer.request.events.put(event)

    def _fail(self, error: Exception) -> None:
        requests = [*self._waiting, *(answer.request for answer in [*self._reading, *self._writing])]
        for answers in (self._waiting, self._reading, self._writing):
            answers.clear()
        self._rows.clear()
        for request in requests:
            request.events.put(error)


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
            if batch in self._batches:
                return
            self._batches.append(batch)
            if len(self._batches) == 1:
                threading.Thread(target=self._work, name="model").start()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._batches = [batch for batch in self._batches if batch.busy]
                batches = list(self._batches)
            if not batches:
                return
            for batch in batches:
                batch.advance()
