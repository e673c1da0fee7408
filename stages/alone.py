"""Run a command when no other one that was started so runs in this folder; a second waits for the first to end.

Run: `python -m stages.alone COMMAND …`. `make` sets up so, before there is an environment: only the standard library.
"""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def hold(path: str = ".dvc", who: str = "another make") -> int:
    """Wait until this process is alone in holding a file or folder; returns the descriptor that holds it.

    The kernel ends the hold with the process, however that ends. A program that takes this process's place by `exec`
    goes on holding; those that it starts do not.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{who} is at work in this folder: waiting for it to end", flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.set_inheritable(descriptor, True)
    return descriptor


@contextmanager
def alone(path: str, who: str) -> Iterator[None]:
    """Hold `path` for the block."""
    descriptor = hold(path, who)
    try:
        yield
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    hold()
    os.execvp(sys.argv[1], sys.argv[1:])
