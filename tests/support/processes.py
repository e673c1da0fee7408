"""Processes of a run: a stage below DVC, its lock, whether it has ended."""

import fcntl
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

from tests.support.project import wait_for


def stage_process(dvc: subprocess.Popen, stage: str) -> psutil.Process:
    """The process of a stage that `dvc` has begun."""
    command = ["-m", "stages", stage]

    found: list[psutil.Process] = []

    def look() -> bool:
        with suppress(psutil.Error):  # one that ends meanwhile
            found.extend(p for p in psutil.Process(dvc.pid).children(recursive=True) if p.cmdline()[1:] == command)
        return bool(found)

    wait_for(look)
    return found[0]


def is_locked(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
