"""The chat app as a user starts it, in a process of its own, on a free port of loopback. For benchmarks and tests."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
START = 120  # seconds that it may take, with a large model on a busy machine


@contextmanager
def chat_server(models: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """Serve the exported models in `models`; gives the address (http://…) and the process, and ends it."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "space/app.py", "--models", models, "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        address = next((word for word in process.stdout.readline().split() if word.startswith("http")), None)
        if address is None:
            sys.exit("error: the chat app did not start")  # it has said why
        wait_until(lambda: answers(address), START)
        yield address, process
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def idle(address: str) -> bool:
    """Whether nobody waits for the model, and it does nothing."""
    state = httpx.get(f"{address}/health", timeout=30).json()
    return (state["running"], state["waiting"]) == (0, 0)


def wait_until(condition: Callable[[], object], seconds: float = 120) -> float:
    """Wait until `condition()` holds; returns the seconds that took. Raises TimeoutError."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"waited {seconds} s in vain")
        time.sleep(0.02)
    return time.monotonic() - began
