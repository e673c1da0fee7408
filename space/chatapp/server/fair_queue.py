"""The fair queue: the models write some answers at a time, and all other requests wait here.

The queue serves clients round robin: first by address, then by session at that address, each in order of arrival.
It has a fixed number of places. When it is full, a client with more waiting requests than the newcomer loses its newest
place and gets "busy"; otherwise the newcomer gets "busy". A client that disconnects leaves the queue, or frees the
model at its next token.

Only one event loop may call the methods. The work itself runs in threads.
"""

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Work = Callable[[threading.Event], Iterator[T]]

MAX_RETRY_AFTER = 60  # seconds; the openai client ignores a longer Retry-After


@dataclass(frozen=True)
class _End:
    """The mark after a job's last item: its work is complete, or it failed."""

    error: Exception | None


@dataclass(frozen=True)
class Client:
    """A client: a network address, and a session at it (of the page, or an API key)."""

    address: str
    session: str = ""


class Busy(Exception):
    """The queue has no place, or the turn did not come in time. `retry_after`: seconds, at least 1."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the server is busy, try again in {retry_after} s")
        self.retry_after = retry_after


class Job(Generic[T]):
    """A place in the queue, and then the items that its work yields. Leave it by the end of an `async with` block."""

    def __init__(self, queue: "FairQueue", client: Client, work: Work[T], number: int) -> None:
        self.client = client
        self.work = work
        self.number = number
        self.cancel = threading.Event()
        # Its result is set when the work begins. Its exception is Busy when the work will never begin.
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.items: asyncio.Queue[Any] = asyncio.Queue()
        self.deadline: asyncio.TimerHandle | None = None  # ends the waiting
        self._queue = queue

    @property
    def ahead(self) -> int:
        """How many jobs come before this one now; the running jobs count."""
        return self._queue.ahead_of(self)

    def leave(self) -> None:
        """Give up the place in the queue, or free the model at its next token. A second call does nothing."""
        self.cancel.set()
        self._queue.leave(self)

    async def batches(self, every: float = 0) -> AsyncIterator[list[T]]:
        """The work's items, in lists of those that came within `every` seconds.

        Raises Busy, and any error that the work raises.
        """
        await self.turn
        while True:
            batch = [await self.items.get()]
            while not self.items.empty():
                batch.append(self.items.get_nowait())
            end = batch.pop() if isinstance(batch[-1], _End) else None
            if batch:
                yield batch
            if end and end.error:
                raise end.error
            if end:
                return
            if every:
                await asyncio.sleep(every)

    async def __aiter__(self) -> AsyncIterator[T]:
        async for batch in self.batches():
            for item in batch:
                yield item

    async def __aenter__(self) -> "Job[T]":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()


class FairQueue:
    """At most `at_once` jobs run. At most `places` more wait, each for at most `patience` seconds."""

    def __init__(self, places: int = 64, patience: float = 60, at_once: int = 1) -> None:
        self.places = places
        self.patience = patience
        self.at_once = at_once
        self._waiting: list[Job] = []
        self._running: set[Job] = set()
        self._workers = ThreadPoolExecutor(at_once, thread_name_prefix="answer")
        self._joined = 0
        # The turn at which each address and each client was last served; only of those that have a job now.
        self._served: dict[str | Client, int] = {}
        self._turns = 0
        self._seconds = 1.0  # a job's duration, as a moving average

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def join(self, client: Client, work: Work[T]) -> Job[T]:
        """Take a place in the queue. `work` gets an event; when it is set, the work must end. Raises Busy."""
        if len(self._running) == self.at_once and len(self._waiting) >= self.places:
            greedy = self._greedier_than(client)
            if greedy is None:
                raise Busy(self.retry_after())
            self._refuse(greedy)
        self._joined += 1
        job = Job(self, client, work, self._joined)
        for key in (client.address, client):
            # A new client comes before the one that is served now, and after all that have waited longer.
            self._served.setdefault(key, self._turns - 1)
        self._waiting.append(job)
        job.deadline = asyncio.get_running_loop().call_later(self.patience, self._refuse, job)
        self._begin_next()
        return job

    def leave(self, job: Job) -> None:
        if job in self._waiting:
            self._take_out(job)
            job.turn.cancel()
            self._forget_absent()
        elif job.turn.done() and not job.turn.cancelled():
            job.turn.exception()  # asyncio logs an exception that nobody has read

    def ahead_of(self, job: Job) -> int:
        order = sorted(self._waiting, key=self._order)
        return order.index(job) + self.running if job in order else 0

    def close(self) -> None:
        """Refuse all waiting jobs and stop the work, because the server ends."""
        for job in list(self._waiting):
            self._refuse(job)
        for job in self._running:
            job.cancel.set()
        self._workers.shutdown(wait=False, cancel_futures=True)

    def retry_after(self) -> int:
        """An estimate of the seconds until all jobs of now are served."""
        return min(
            MAX_RETRY_AFTER, max(1, math.ceil(self._seconds * (len(self._waiting) + self.running) / self.at_once))
        )

    def _order(self, job: Job) -> tuple[int, int, int]:
        return self._served[job.client.address], self._served[job.client], job.number

    def _greedier_than(self, client: Client) -> Job | None:
        """The newest job of a greedier address, or of a greedier client at the same address.

        Greedier: it has more waiting jobs than the newcomer would have with one more.
        """
        keys: list[Callable[[Client], Hashable]] = [lambda one: one.address, lambda one: one]
        for key in keys:
            jobs_of = Counter(key(job.client) for job in self._waiting)
            greediest, count = max(jobs_of.items(), key=lambda item: item[1], default=(None, 0))
            if jobs_of[key(client)] + 1 < count:
                return next(job for job in reversed(self._waiting) if key(job.client) == greediest)
        return None

    def _refuse(self, job: Job) -> None:
        """Take a waiting job out of the queue: awaiting its turn then raises Busy."""
        busy = Busy(self.retry_after())
        self._take_out(job)
        job.turn.set_exception(busy)
        self._forget_absent()

    def _take_out(self, job: Job) -> None:
        self._waiting.remove(job)
        if job.deadline is not None:
            job.deadline.cancel()

    def _begin_next(self) -> None:
        if len(self._running) == self.at_once or not self._waiting:
            return
        job = min(self._waiting, key=self._order)
        self._take_out(job)
        self._running.add(job)
        self._turns += 1
        self._served[job.client.address] = self._served[job.client] = self._turns
        job.turn.set_result(None)
        loop = asyncio.get_running_loop()
        began = time.monotonic()
        done = loop.run_in_executor(self._workers, self._work_through, job, loop)
        done.add_done_callback(lambda _: self._finished(job, time.monotonic() - began))

    def _work_through(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        def emit(item: object) -> None:
            loop.call_soon_threadsafe(job.items.put_nowait, item)

        try:
            for item in job.work(job.cancel):
                emit(item)
            emit(_End(None))
        except Exception as error:
            emit(_End(error))

    def _finished(self, job: Job, seconds: float) -> None:
        self._running.remove(job)
        self._seconds += 0.2 * (seconds - self._seconds)
        self._forget_absent()
        self._begin_next()

    def _forget_absent(self) -> None:
        present = [*self._waiting, *self._running]
        keys = {key for job in present for key in (job.client.address, job.client)}
        self._served = {key: turn for key, turn in self._served.items() if key in keys}
