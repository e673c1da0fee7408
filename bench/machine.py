"""The machine that a benchmark ran on, and the page where its table stands."""

import os
import platform
import re
import time
from pathlib import Path

import torch

from bench.chat_server import ROOT
from stages.common.artifacts import write_text

PAGE = ROOT / "docs/measurements.md"


def processor() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    name = re.search(r"model name\s*: (.*)", text)
    widest = next((flag for flag in ("amx_tile", "avx512f", "avx2") if re.search(rf"\b{flag}\b", text)), "")
    return f"{os.cpu_count()} cores of {name[1] if name else platform.machine()} ({widest or 'no vector flags'})"


def bytes_a_second() -> float:
    """How fast all cores together read memory: a sum over 1 GB, the best of 5."""
    numbers, times = torch.ones(250_000_000), []
    for _ in range(5):
        began = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - began)
    return 1e9 / min(times)


def _parts(name: str) -> tuple[str, str, str]:
    """The page before a benchmark's table, the table and what follows."""
    begin, end = f"<!-- made by python -m {name} -->\n", "<!-- end -->\n"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    table, _, after = rest.partition(end)
    return before + begin, table, end + after


def published(name: str) -> str:
    """The table of the benchmark `name` in docs/measurements.md."""
    return _parts(name)[1]


def publish(name: str, table: str) -> None:
    """Print a benchmark's table, and put it into docs/measurements.md."""
    before, _, after = _parts(name)
    write_text(PAGE, before + table + after)
    print(table)
