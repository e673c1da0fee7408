"""Lock files: one process at a time works in a folder, a second waits for the first.

Run: `python -m stages.common.locks COMMAND …` runs a command under the folder's lock. `make` uses it for set-up,
before there is an environment. So this file needs only the standard library.
"""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCKS = Path(".dvc/tmp")  # git-ignored by DVC's own .gitignore


def hold(name: str, who: str) -> int:
    """Wait until no other process holds the lock `name`; returns the file descriptor that holds it.

    The kernel releases the lock when the process ends, however it ends. A program that replaces this process by `exec`
    keeps the lock; programs that this process starts do not.
    """
    LOCKS.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(LOCKS / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{who} runs in this folder: waiting until it ends", flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.set_inheritable(descriptor, True)
    return descriptor


@contextmanager
def alone(name: str, who: str) -> Iterator[None]:
    """Hold the lock `name` for the block."""
    descriptor = hold(name, who)
    try:
        yield
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    hold("make", "another make")
    os.execvp(sys.argv[1], sys.argv[1:])
