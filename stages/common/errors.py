"""How a stage fails: one clear line for what a user can mend, a traceback only for a bug of ours."""

import os
import sys
import warnings
from collections.abc import Callable


class StageError(Exception):
    """An expected failure. The message says what is wrong, where, and how to mend it."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()


def run_stage(main: Callable[[], None], *, network: bool = False) -> None:
    """Run a stage's `main()`; an expected failure prints its message alone and exits with 1.

    Only a stage that says `network=True` may reach the Hugging Face hub: the others would otherwise ask it for
    kernels and files they do not need, and wait for it on a machine that is offline.
    """
    if not network:
        os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|bitsandbytes|peft|transformers|accelerate)")
    try:
        main()
    except StageError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
