"""What the machine has: cores, memory, disk, GPU. A stage may refuse to run on a machine. What it computes does not
depend on the machine."""

import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from stages.common.errors import StageError


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
    total = psutil.virtual_memory().total
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            total = min(total, int(text))
    card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        cores, total, shutil.disk_usage(".").free, card.total_memory if card else None, card.name if card else ""
    )


def check_machine(fp16: bool, bf16: bool, attn_implementation: str) -> None:
    """Raise StageError when this machine cannot train as the parameters ask."""
    flash = "attn_implementation: flash_attention_2"
    if not torch.cuda.is_available():
        if fp16:
            raise StageError(
                "fp16: true: needs a CUDA GPU, and this machine shows none. "
                "Set fp16: false (float32), or take the CPU recipe: make recipe NAME=smollm2-cpu"
            )
        if attn_implementation == "flash_attention_2":
            raise StageError(f"{flash} needs a CUDA GPU. Set it to sdpa.")
    elif bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise StageError(f"bf16: true: {torch.cuda.get_device_name()} has no bfloat16. Set bf16: false and fp16: true.")
    elif attn_implementation == "flash_attention_2":
        if not (fp16 or bf16):
            raise StageError(f"{flash} computes in 16 bits only. Set bf16: true or fp16: true, or sdpa.")
        if find_spec("flash_attn") is None:
            raise StageError(f"{flash} needs the package flash-attn. Install it (pip install flash-attn), or set sdpa.")
