"""What the machine has: cores, memory, disk, GPU. Stages refuse by it; they never compute otherwise because of it."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """What there is to run on. Sizes in bytes; `gpu` is the first card's memory, None without one."""

    cores: int
    memory: int
    disk: int
    gpu: int | None
    gpu_name: str = ""


def this_machine() -> Machine:
    """This machine's cores, memory (or what its container may use), free disk here and first GPU."""
    import psutil
    import torch

    total = psutil.virtual_memory().total
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            total = min(total, int(text))
    card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        cores, total, shutil.disk_usage(".").free, card.total_memory if card else None, card.name if card else ""
    )
