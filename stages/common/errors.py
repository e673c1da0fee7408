"""How a stage fails: one clear line for what a user can fix, a traceback only for a bug of ours."""

import errno

DISK_FULL = "the disk is full. Free some space, then run the same command again."
# How libraries report a full disk. torch's archive writer names only the line of its code that failed.
DISK_FULL_SIGNS = (
    "No space left",
    "Disk quota exceeded",
    "os error 28",
    "os error 122",
    "error number 28",
    "enforce fail at inline_container.cc",
)


class StageError(Exception):
    """An expected failure. The message says what is wrong, where, and how to fix it."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message."""
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
