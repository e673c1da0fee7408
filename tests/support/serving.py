"""The chat app in this process, on a free port of loopback; slow and failing engines for it."""

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from app import listen
from bench.chat_server import answers, wait_until
from chatapp.engine import Chunk
from chatapp.serve import build

COMMIT = "a1b2c3"  # the page shows it


class Paced:
    """A slow engine: `seconds` more for each piece of an answer."""

    def __init__(self, engine, seconds: float) -> None:
        self._engine = engine
        self.seconds = seconds
        self.card = engine.card
        self.context_length = engine.context_length

    def stream(self, *args) -> Iterator:
        for chunk in self._engine.stream(*args):
            time.sleep(self.seconds)
            yield chunk


class Scripted:
    """An engine without a model: it answers with the words of `text`, as many as are asked for."""

    context_length = 2048

    def __init__(self, text: str, card: dict) -> None:
        self._words = re.findall(r"\s*\S+\s*$|\s*\S+", text)
        self.card = card

    def stream(self, messages, sampling, cancel) -> Iterator[Chunk]:
        words = self._words[: sampling.max_tokens]
        for count, word in enumerate(words, start=1):
            if cancel.is_set():
                yield Chunk("", count, "cancelled", seconds=count / 50)
                return
            yield Chunk(word, count, None, seconds=count / 50)
        end = "stop" if len(words) == len(self._words) else "length"
        yield Chunk("", len(words), end, seconds=len(words) / 50)


class Held:
    """An engine whose pieces wait until a test allows them, so that no answer ends before the test has seen it.

    An answer that is cancelled ends without permission.
    """

    def __init__(self, engine) -> None:
        self._engine = engine
        self._allowed = threading.Semaphore(0)
        self.card = engine.card
        self.context_length = engine.context_length

    def hold(self) -> None:
        """Take back what was allowed and not used."""
        self._allowed = threading.Semaphore(0)

    def allow(self, pieces: int = 100_000) -> None:
        self._allowed.release(pieces)

    def stream(self, messages, sampling, cancel) -> Iterator:
        for chunk in self._engine.stream(messages, sampling, cancel):
            while not (cancel.is_set() or self._allowed.acquire(timeout=0.01)):
                pass
            yield chunk


class Failing:
    """An engine that fails at the piece number `fails_at` of each answer (None: never)."""

    def __init__(self, engine) -> None:
        self._engine = engine
        self.fails_at: int | None = None
        self.card = engine.card
        self.context_length = engine.context_length

    def stream(self, *args) -> Iterator:
        for number, chunk in enumerate(self._engine.stream(*args)):
            if number == self.fails_at:
                raise RuntimeError("secret detail")
            yield chunk


@contextmanager
def served(engines, queue, send_buffer: int | None = None, access=None, evaluation=None, **settings) -> Iterator[str]:
    """Serve these engines in a thread of this process; gives the address.

    `access`: who may use the API. `evaluation`: the figures that the page shows. `settings` are uvicorn's.
    `send_buffer`: bytes that the system holds for a client that does not read.
    """
    listener = listen("127.0.0.1", 0)
    if send_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    settings = {"log_level": "warning", "timeout_graceful_shutdown": 1, **settings}
    server = uvicorn.Server(uvicorn.Config(build(engines, queue, COMMIT, access, evaluation), **settings))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: answers(address))
        yield address
    finally:
        server.should_exit = True
        thread.join(30)
