"""How a stage fails: one clear line for what a user can mend, a traceback only for a bug of ours."""

import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from types import FrameType

from stages.alone import alone

DISK_FULL = "the disk is full. Free some space and run `dvc repro` again."
# What libraries make of it. The archive writer of torch passes on no reason at all, only where in its code it stopped.
DISK_FULL_SIGNS = (
    "No space left",
    "Disk quota exceeded",
    "os error 28",
    "os error 122",
    "error number 28",
    "enforce fail at inline_container.cc",
)


class StageError(Exception):
    """An expected failure. The message says what is wrong, where, and how to mend it."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception comes from a full disk or quota, also where a library rewords the system's error."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(error) for sign in DISK_FULL_SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # schedulers send it to a whole group, whose heads pass it on: once will do
    raise KeyboardInterrupt


def run_stage(main: Callable[[], None], *, network: bool = False, one_at_a_time: bool = False) -> None:
    """Run a stage's `main()`; an expected failure prints its message alone and exits with 1.

    Only a stage that says `network=True` may reach the Hugging Face hub: the others would otherwise ask it for
    kernels and files they do not need, and wait for it on a machine that is offline. `one_at_a_time`: it waits for one
    of the same name in this folder that goes on where only the DVC above it was killed.
    """
    if not network:
        os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|bitsandbytes|peft|transformers|accelerate)")
    # As Ctrl-C does, SIGTERM lets half-made outputs be cleared away.
    signal.signal(signal.SIGTERM, _terminate)
    file = str(main.__globals__["__file__"])
    name = os.path.basename(file).removesuffix(".py")
    try:
        with alone(file, f"another {name}") if one_at_a_time else nullcontext():
            main()
    except StageError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("error: stopped before the end; no output was touched. `dvc repro` goes on.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not is_disk_full(error):
            raise
        sys.exit(f"error: {DISK_FULL}")
