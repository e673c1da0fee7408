"""How a stage or a command starts and ends: its environment is set before its module is imported, and it fails in one
line.

`python -m stages` and `python -m commands` call `run`. The libraries read these variables when they are imported, so
nothing here imports any of them.
"""

import gc
import importlib
import logging
import os
import signal
import sys
import warnings
from contextlib import nullcontext
from types import FrameType

from stages.common.errors import DISK_FULL, StageError, is_disk_full
from stages.common.locks import alone

# Turns off what the libraries send, and what they print at every start.
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "BITSANDBYTES_NOWELCOME": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "DO_NOT_TRACK": "1",
}


def set_environment(network: bool) -> None:
    """Turn off telemetry and noise. Without `network`, libraries do not ask the Hugging Face hub for kernels and files
    that nobody needs, and do not wait for it on an offline machine."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not network:
        os.environ["HF_HUB_OFFLINE"] = "1"
    # bitsandbytes works without the faster kernels that it looks for at each load of a 4-bit model.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|bitsandbytes|peft|transformers|accelerate)")


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # schedulers signal a process group, and parents forward it: ignore repeats
    raise KeyboardInterrupt


def run(module: str, *, network: bool = False, lock: str | None = None) -> None:
    """Import `module` and call its main(); an expected failure prints one message and exits with status 1.

    `lock`: wait for another process of this name in this folder. (If DVC was killed, its stage may still run.)
    """
    set_environment(network)
    # As Ctrl-C does, SIGTERM lets a stage remove its half-made outputs.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        with alone(lock, f"another {lock}") if lock else nullcontext():
            main = importlib.import_module(module).main
            gc.freeze()  # what the libraries hold stays: no collection needs to walk through it
            main()
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` for example, has enough: nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except StageError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        remedy = "No output was changed; `dvc repro` resumes." if lock else "Run the same command again."
        print(f"error: stopped before the end. {remedy}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not is_disk_full(error):
            raise
        sys.exit(f"error: {DISK_FULL}")


def run_named(package: str, networked: dict[str, bool], *, lock: bool) -> None:
    """Run the module of `package` that the first argument names, with the other arguments. `networked`: each name, and
    whether it may reach the network."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in networked:
        sys.exit(f"error: python -m {package} {name or 'NAME'}: NAME is one of {', '.join(networked)}")
    run(f"{package}.{name}", network=networked[name], lock=name if lock else None)
