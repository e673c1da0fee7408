"""Start the chat app as a user does: in its own process, on a free port of loopback. For benchmarks and tests."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
APP = ROOT / "space/app.py"
TIMEOUT_START = 120  # seconds; enough for a large model on a busy machine


@contextmanager
def chat_server(models: Path, *arguments: str, app: Path = APP) -> Iterator[tuple[str, subprocess.Popen]]:
    """Serve the exported models in `models` by `app`. Gives address (http://…) and process, and ends the process."""
    process = subprocess.Popen(
        [sys.executable, app, "--models", models, "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = printed_address(process)
        if address is None:
            sys.exit("error: the chat app did not start")  # the app has printed the reason
        wait_until(lambda: answers(address), TIMEOUT_START)
        yield address, process
    finally:
        process.terminate()
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


def printed_address(process: subprocess.Popen) -> str | None:
    """The page's address in the app's first line, or None when the app ended without one."""
    assert process.stdout is not None
    return next((word for word in process.stdout.readline().split() if word.startswith("http")), None)


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def idle(address: str) -> bool:
    """Whether the model does nothing and no request waits for it."""
    state = httpx.get(f"{address}/health", timeout=30).json()
    return (state["running"], state["waiting"]) == (0, 0)


def wait_until(condition: Callable[[], object], seconds: float = 120) -> float:
    """Wait until `condition()` is true; return the seconds that it took. Raises TimeoutError."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"the condition was not true within {seconds} s")
        time.sleep(0.02)
    return time.monotonic() - began
