"""Checkpoints of a training run: verified before use, bounded in number, written when the run is asked to stop.

They lie in models/checkpoints/FINGERPRINT/checkpoint-STEP/ and are no output of a stage. trainer.py uses them.
"""

import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from stages.common.artifacts import digest_files, read_json, write_json
from stages.common.errors import StageError

# Written last: a checkpoint without it is incomplete.
SEAL = "seal.json"
# Seconds in which SIGTERM counts once: schedulers signal a process group, and parents forward it.
REPEAT_SECONDS = 3.0
# Abandoned runs whose checkpoints are kept: a user may go back to their parameters.
ABANDONED_RUNS = 2


def content_digest(checkpoint: Path) -> str:
    return digest_files(sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != SEAL))


def seal(checkpoint: Path, loss_sum: float, last_logged: int) -> None:
    """Close a checkpoint: record the hash of its files, and the sum of the losses since the last logged step.

    The trainer's own state lacks that sum. Without it, the first point of the curve after a resume would differ.
    """
    digest = content_digest(checkpoint)
    write_json(checkpoint / SEAL, {"sha256": digest, "loss_sum": loss_sum, "last_logged": last_logged})


def newest_first(folder: Path) -> list[Path]:
    numbered = {int(p.name.partition("-")[2]): p for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()}
    return [path for _, path in sorted(numbered.items(), reverse=True)]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`; newer, incomplete ones are removed, with a line for each."""
    for path in newest_first(folder):
        try:
            recorded = read_json(path / SEAL)["sha256"]
        except (StageError, KeyError, TypeError):
            print(f"train: skipping {path}: it is incomplete", flush=True)
        else:
            if recorded == content_digest(path):
                return path
            print(f"train: skipping {path}: it is damaged, its files have changed", flush=True)
        shutil.rmtree(path)
    return None


def remove_older(folder: Path, keep: int, best: Path | None = None) -> None:
    """Keep the newest few checkpoints in `folder`, and `best`. Call it only after the newest is sealed."""
    for path in newest_first(folder)[keep:]:
        if best is None or path.name != best.name:
            shutil.rmtree(path)


def remove_abandoned(folder: Path, current: str) -> None:
    """Keep the checkpoints of `current` and of the newest few other runs in `folder`; remove the rest."""
    others = [path for path in folder.glob("*") if path.is_dir() and path.name != current]
    for path in sorted(others, key=lambda path: path.stat().st_mtime)[:-ABANDONED_RUNS]:
        print(f"train: removing the checkpoints of an older run, {path}", flush=True)
        shutil.rmtree(path)


class StopWhenAsked(TrainerCallback):
    """On Ctrl-C or SIGTERM, finish the running step, save it and end the training. A second signal ends it at once."""

    def __init__(self) -> None:
        self.asked: str | None = None  # the signal's name
        self._since = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        previous: dict[int, Any] = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            if self.asked == "SIGTERM":  # a forwarded copy of it may still come
                previous[signal.SIGTERM] = signal.SIG_IGN
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if number == signal.SIGTERM and time.monotonic() - self._since < REPEAT_SECONDS:
                return
            raise KeyboardInterrupt
        self.asked, self._since = signal.Signals(number).name, time.monotonic()
        print(f"\ntrain: {self.asked}: finishing this step and saving it (once more: stop at once)", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True


class RestoreLossSum(TrainerCallback):
    """Give a trainer that resumes from a checkpoint the sum of the losses before it."""

    def __init__(self, trainer: Any, checkpoint: Path) -> None:
        self.trainer = trainer
        self.sealed = read_json(checkpoint / SEAL)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._tr_loss.fill_(self.sealed["loss_sum"])
        self.trainer._globalstep_last_logged = self.sealed["last_logged"]
