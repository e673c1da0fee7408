"""Start the Space as Hugging Face does: build/space/ alone, in a new environment with its own pinned requirements.

It prints the time to the first page, and the memory beyond the models' size: at the first page, and after long
conversations with every model. It fails when the page takes more than 20 s, when torch was installed, or when that
memory is more than 1 GB (not checked for models of more than 1 GB, whose context is larger, too). It downloads
packages. Run: `python -m bench.space`
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from bench.chat_server import ROOT, printed_address, wait_until
from commands.space import build_space

MAX_MEMORY = 1e9  # bytes beyond the models
MAX_SECONDS = 20  # until the first page
TIMEOUT_START = 300  # seconds; then the benchmark gives up


def memory(process: subprocess.Popen) -> int:
    """Resident bytes of a process and its children."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return sum(member.memory_info().rss for member in family)


def first_page(address: str) -> bool:
    try:
        return 'property="og:title"' in httpx.get(address, timeout=5).text
    except httpx.TransportError:
        return False


def converse(address: str) -> int:
    """Fill each model's context with a long conversation; returns the tokens read."""
    total = 0
    for model in httpx.get(f"{address}/v1/models", timeout=60).json()["data"]:
        words = " ".join(f"{i} apples" for i in range(model["context_length"] // 7))
        for question in ("How many?", "And then?"):
            messages = [{"role": "user", "content": f"{words} {question}"}]
            asked = {"model": model["id"], "messages": messages, "max_tokens": 32}
            response = httpx.post(f"{address}/v1/chat/completions", json=asked, timeout=600)
            response.raise_for_status()
            total += response.json()["usage"]["total_tokens"]
    return total


@dataclass(frozen=True)
class Measured:
    seconds: float  # until the first page
    at_first: int  # bytes of memory at the first page
    after: int  # bytes of memory after long conversations with every model
    tokens: int  # of these conversations


def new_environment(folder: Path, venv: Path) -> Path:
    """An environment with the packages that the Space in `folder` requires; returns its Python."""
    print("bench: a new environment with the Space's requirements", flush=True)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = venv / "bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", folder / "requirements.txt"], check=True)
    if subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0:
        sys.exit("error: the Space's requirements installed torch")
    return python


def measure(folder: Path, python: Path) -> Measured:
    """Start the Space in `folder`, with nothing of this machine's environment, and use it."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder.parent), "LANG": "C.UTF-8"}
    command = [str(python), "app.py", "--port", "0"]
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        address = printed_address(process)
        if address is None:
            sys.exit("error: the Space did not start")  # the app has printed the reason
        wait_until(lambda: first_page(address), TIMEOUT_START)
        seconds, at_first = time.monotonic() - began, memory(process)
        tokens = converse(address)
        return Measured(seconds, at_first, memory(process), tokens)
    finally:
        process.terminate()
        process.wait(30)


def main() -> None:
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="space-") as temporary:
        folder = Path(temporary) / "space"
        shutil.copytree(build_space(), folder)
        models = sum(path.stat().st_size for path in (folder / "model").rglob("model.onnx*"))
        measured = measure(folder, new_environment(folder, Path(temporary) / "venv"))
    at_first, after = measured.at_first - models, measured.after - models
    print(f"first page after {measured.seconds:.1f} s")
    print(f"models: {models / 1e9:.2f} GB; memory beyond them: {at_first / 1e9:.2f} GB at the first page,")
    print(f"{after / 1e9:.2f} GB after long conversations with every model ({measured.tokens:,} tokens)")
    if measured.seconds > MAX_SECONDS:
        sys.exit(f"error: the first page took more than {MAX_SECONDS} s")
    if after > MAX_MEMORY and models < MAX_MEMORY:
        sys.exit(f"error: that is more than {MAX_MEMORY / 1e9:.0f} GB")


if __name__ == "__main__":
    main()
