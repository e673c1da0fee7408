"""Start the Space as Hugging Face does: build/space/ alone, in a new environment with its own pinned requirements.

Prints the time to the first page, and the memory beyond the size of the models: then, and after long conversations
with every model. Fails when the page takes more than 20 s, when that memory is more than 1 GB (models of more than
1 GB have a larger context in memory, too: they are only said), or when torch came along. Packages are downloaded.
Run: `python -m bench.space`
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from bench.chat_server import ROOT, wait_until
from commands.space import build_space

MOST = 1e9  # bytes beyond the models
SOON = 20  # seconds until the first page
START = 300  # seconds that are waited for it


def memory(process: subprocess.Popen) -> int:
    """Resident bytes of a process and all below it."""
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


def main() -> None:
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="space-") as temporary:
        folder, venv = Path(temporary) / "space", Path(temporary) / "venv"
        shutil.copytree(build_space(), folder)
        models = sum(path.stat().st_size for path in (folder / "model").rglob("model.onnx*"))
        print("bench: a new environment with the Space's requirements", flush=True)
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        python = venv / "bin/python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", folder / "requirements.txt"], check=True)
        if subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0:
            sys.exit("error: torch came along with the Space's requirements")
        command = [str(python), "app.py", "--port", "0"]
        environment = {"PATH": "/usr/bin:/bin", "HOME": temporary, "LANG": "C.UTF-8"}
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            address = next((word for word in process.stdout.readline().split() if word.startswith("http")), None)
            if address is None:
                sys.exit("error: the Space did not start")  # it has said why
            wait_until(lambda: first_page(address), START)
            seconds, at_first = time.monotonic() - began, memory(process)
            tokens = converse(address)
            after = memory(process)
        finally:
            process.terminate()
            process.wait(30)
    print(f"first page after {seconds:.1f} s")
    print(f"models: {models / 1e9:.2f} GB; memory beyond them: {(at_first - models) / 1e9:.2f} GB at the first page,")
    print(f"{(after - models) / 1e9:.2f} GB after long conversations with every model ({tokens:,} tokens)")
    if seconds > SOON:
        sys.exit(f"error: the first page took more than {SOON} s")
    if after - models > MOST and models < MOST:
        sys.exit(f"error: that is more than {MOST / 1e9:.0f} GB")


if __name__ == "__main__":
    main()
