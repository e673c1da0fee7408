"""The line before the model: it computes one answer at a time, and everyone else waits here, each in turn.

Clients are served round robin: first by address, then by session at that address, each in the order of arrival. The
line is bounded: when it is full, whoever has most waiting gives up the newest place, and is told that the server is
busy. Whoever goes away leaves the line, or frees the model at its next token.

All methods belong to one event loop; only the work itself runs in a thread.
"""

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Work = Callable[[threading.Event], Iterator[T]]

LONGEST_RETRY = 60  # seconds; the openai client does not obey a longer Retry-After


@dataclass(frozen=True)
class _End:
    """What follows the last item: the work is done, or has failed."""

    error: Exception | None


@dataclass(frozen=True)
class Client:
    """Who waits: a network address, and a session at it (of the page, or an API key)."""

    address: str
    session: str = ""


class Busy(Exception):
    """No place in the line, or no turn within the time that one waits. `retry_after`: seconds, at least 1."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the server is busy, try again in {retry_after} s")
        self.retry_after = retry_after


class Job(Generic[T]):
    """A place in the line, and then the items that its work yields. Leaving its `async with` block gives it up."""

    def __init__(self, queue: "FairQueue", client: Client, work: Work[T], number: int) -> None:
        self.client = client
        self.work = work
        self.number = number
        self.cancel = threading.Event()
        # Done when the work begins; waiting for it raises Busy when it will not.
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.items: asyncio.Queue[Any] = asyncio.Queue()
        self.deadline: asyncio.TimerHandle | None = None  # when it gives up waiting
        self._queue = queue

    @property
    def ahead(self) -> int:
        """How many jobs begin before this one, as the line is now; the running one counts."""
        return self._queue.ahead_of(self)

    def leave(self) -> None:
        """Give up the place in the line, or the model at its next token. May be called twice."""
        self.cancel.set()
        self._queue.leave(self)

    async def batches(self, every: float = 0) -> AsyncIterator[list[T]]:
        """What the work yields, in lists of what came within `every` seconds. Raises Busy, and what the work raises."""
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
    """At most `places` jobs wait, each at most `patience` seconds."""

    def __init__(self, places: int = 64, patience: float = 60) -> None:
        self.places = places
        self.patience = patience
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._joined = 0
        # When an address or a client last got its turn, on a clock that counts turns; only of those who are here.
        self._served: dict[str | Client, int] = {}
        self._clock = 0
        self._seconds = 1.0  # that a job takes, a moving average

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return int(self._running is not None)

    def join(self, client: Client, work: Work[T]) -> Job[T]:
        """Take a place in the line; `work` is called with an event that tells it to stop. Raises Busy."""
        if self._running is not None and len(self._waiting) >= self.places:
            self._refuse(self._greedier_than(client))
        self._joined += 1
        job = Job(self, client, work, self._joined)
        for key in (client.address, client):
            # A newcomer goes before who was just served, and behind all who wait longer than that.
            self._served.setdefault(key, self._clock - 1)
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
            job.turn.exception()  # seen, even if nobody waited for it

    def ahead_of(self, job: Job) -> int:
        order = sorted(self._waiting, key=self._order)
        return order.index(job) + self.running if job in order else 0

    def close(self) -> None:
        """Refuse who waits and stop the work: the server ends."""
        for job in list(self._waiting):
            self._refuse(job)
        if self._running is not None:
            self._running.cancel.set()
        self._worker.shutdown(wait=False, cancel_futures=True)

    def retry_after(self) -> int:
        """Seconds until the line as it is now will have been served, as far as one can tell."""
        return min(LONGEST_RETRY, max(1, math.ceil(self._seconds * (len(self._waiting) + self.running))))

    def _order(self, job: Job) -> tuple[int, int, int]:
        return self._served[job.client.address], self._served[job.client], job.number

    def _greedier_than(self, client: Client) -> Job | None:
        """The newest job of the address, or else of the client, that would still have as many as this one."""
        for level in (lambda who: who.address, lambda who: who):
            counts = Counter(level(job.client) for job in self._waiting)
            greediest, most = max(counts.items(), key=lambda item: item[1], default=(None, 0))
            if counts[level(client)] + 1 < most:
                return next(job for job in reversed(self._waiting) if level(job.client) == greediest)
        return None

    def _refuse(self, job: Job | None) -> None:
        """Tell a job, or (None) the one that wants to join, that there is no place for it."""
        busy = Busy(self.retry_after())
        if job is None:
            raise busy
        self._take_out(job)
        job.turn.set_exception(busy)
        self._forget_absent()

    def _take_out(self, job: Job) -> None:
        self._waiting.remove(job)
        if job.deadline is not None:
            job.deadline.cancel()

    def _begin_next(self) -> None:
        if self._running is not None or not self._waiting:
            return
        job = min(self._waiting, key=self._order)
        self._take_out(job)
        self._running = job
        self._clock += 1
        self._served[job.client.address] = self._served[job.client] = self._clock
        job.turn.set_result(None)
        loop = asyncio.get_running_loop()
        began = time.monotonic()
        done = loop.run_in_executor(self._worker, self._work_through, job, loop)
        done.add_done_callback(lambda _: self._finished(time.monotonic() - began))

    def _work_through(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        def emit(item: object) -> None:
            loop.call_soon_threadsafe(job.items.put_nowait, item)

        try:
            for item in job.work(job.cancel):
                emit(item)
            emit(_End(None))
        except Exception as error:
            emit(_End(error))

    def _finished(self, seconds: float) -> None:
        self._running = None
        self._seconds += 0.2 * (seconds - self._seconds)
        self._forget_absent()
        self._begin_next()

    def _forget_absent(self) -> None:
        here = [*self._waiting, *([self._running] if self._running else [])]
        keys = {key for job in here for key in (job.client.address, job.client)}
        self._served = {key: turn for key, turn in self._served.items() if key in keys}
