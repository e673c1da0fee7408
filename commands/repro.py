"""Run `dvc repro` alone in this folder, after repairing what a killed one may have left half-written.

DVC writes two files in place, dvc.lock and its table of locks, and cannot read a half-written one. DVC's other locks
end with their process. SIGTERM is forwarded to DVC and its stage: otherwise only DVC would end, and the stage would
continue.
Run: `python -m commands repro` (and what `dvc repro` takes); `make all` does.
"""

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from dvc.lock import make_lock
from dvc.rwlock import RWLOCK_LOCK, SCHEMA
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from voluptuous import Invalid

from commands.lockfile import LOCK
from stages.common.artifacts import write_json
from stages.common.errors import StageError
from stages.common.locks import alone, hold
from stages.common.params import read_params
from stages.common.pipeline import read_pipeline

RWLOCK = Path(".dvc/tmp/rwlock")
POLL_SECONDS = 0.1


def is_complete(path: Path) -> bool:
    """Whether a file of DVC's is absent or complete."""
    try:
        text = path.read_text(encoding="utf-8")
        if path == RWLOCK:
            SCHEMA(json.loads(text))
        else:
            COMPILED_LOCKFILE_SCHEMA(YAML(typ="safe").load(text))
    except FileNotFoundError:
        return True
    except (ValueError, YAMLError, Invalid):
        return False
    return True


def release_the_dead() -> None:
    """Remove killed processes that no parent has collected (zombies) from DVC's table of locks.

    DVC takes them for living ones. In a container whose first process does not collect them, they stay forever.
    """
    if not RWLOCK.is_file():
        return
    with make_lock(str(RWLOCK.with_name(RWLOCK_LOCK)), tmp_dir=str(RWLOCK.parent)):  # as DVC edits it
        table = json.loads(RWLOCK.read_text(encoding="utf-8"))
        alive: dict[str, Any] = {
            "write": {path: holder for path, holder in table.get("write", {}).items() if not ended(holder["pid"])},
            "read": {
                path: living
                for path, holders in table.get("read", {}).items()
                if (living := [holder for holder in holders if not ended(holder["pid"])])
            },
        }
        if alive != table:
            write_json(RWLOCK, alive)


def is_dead(process: psutil.Process) -> bool:
    """Whether a process has ended. One that no parent has collected (a zombie) has; so has one whose number another
    process has now."""
    try:
        return not process.is_running() or bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def ended(pid: int) -> bool:
    try:
        return is_dead(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return True


def repair() -> None:
    """Move half-written files of a killed DVC aside, and release its locks. Raises StageError for a dvc.lock with a
    merge conflict."""
    for path, what in (
        (RWLOCK, "DVC starts a new one"),
        (LOCK, "DVC writes it again, from its cache of runs where it can"),
    ):
        if is_complete(path):
            continue
        time.sleep(0.5)  # a `dvc` started by hand may be writing it just now
        if is_complete(path):
            continue
        if b"<<<<<<<" in path.read_bytes():
            raise StageError(
                f"{path} holds a merge conflict. Choose a side: git checkout --ours {path}, then dvc repro."
            )
        aside = RWLOCK.with_name(f"{path.name}.damaged")
        aside.parent.mkdir(parents=True, exist_ok=True)
        path.replace(aside)
        print(f"{path} was incomplete, and is now {aside}: {what}.", flush=True)
    release_the_dead()


def wait_for_stages() -> None:
    """Wait for stages that still run though their DVC has ended: a training saves its step first."""
    for name in read_pipeline():
        with alone(name, name):
            pass


def main() -> None:
    read_params()  # a wrong value of any stage, before DVC removes the outputs of the first that runs
    hold("make", "another make")
    repair()
    asked = forwarded = 0

    def count(*_: object) -> None:  # no more than that: a second signal may come while the first is handled
        nonlocal asked
        asked += 1

    signal.signal(signal.SIGTERM, count)
    dvc = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", *sys.argv[1:]], close_fds=False
    )  # DVC inherits the lock
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to every process of the group
    ending: set[psutil.Process] = set()
    while dvc.poll() is None or not all(is_dead(member) for member in ending):
        if forwarded < asked:
            forwarded = asked
            ending.update(psutil.Process().children(recursive=True))
            for member in ending:
                with suppress(psutil.NoSuchProcess):
                    member.terminate()
        time.sleep(POLL_SECONDS)
    if asked:
        wait_for_stages()
    sys.exit(dvc.returncode if dvc.returncode >= 0 else 128 - dvc.returncode)
