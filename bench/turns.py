"""Sides of a benchmark that take turns: each a process of its own, all alive at once."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from bench.chat_server import ROOT


def wait_for_turn() -> None:
    print("ready", flush=True)
    if not sys.stdin.readline():
        sys.exit(1)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Side:
    """A side's process, which waits for its turns."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.turns: list[dict[str, float]] = []
        self.read_until_ready()

    def read(self) -> dict[str, float] | None:
        """The next record; None once the process waits for its turn. Lines of libraries are skipped."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line == "ready\n":
                return None
            if line.startswith("{") and '"' in line:
                return json.loads(line)
        sys.exit(f"error: {self.name} ended with {self.process.wait()}; its messages are above.")

    def read_until_ready(self) -> None:
        while self.read() is not None:
            pass

    def turn(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        record = self.read()
        assert record is not None
        return record
