"""Run `dvc repro` alone in this folder, after mending what a killed one may have left half-written.

DVC's other locks end with their process. These two files it writes in place, and would stumble over afterwards. SIGTERM
is passed on to DVC and its stage: DVC alone would end and leave the stage at work.
Run: `python -m stages.repro` (and what `dvc repro` takes); `make all` does.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from voluptuous import Invalid

from stages.alone import hold
from stages.common.artifacts import write_json
from stages.common.errors import StageError, run_stage

RWLOCK = Path(".dvc/tmp/rwlock")
LOCK = Path("dvc.lock")


def is_whole(path: Path) -> bool:
    """Whether a file of DVC's is absent, or was written to its end."""
    from dvc.rwlock import SCHEMA
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA

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
    """Take out of DVC's table of locks the killed processes that nobody has taken notice of (zombies).

    DVC takes them for living ones; in a container whose first process does not collect them they stay for good.
    """
    from dvc.lock import make_lock
    from dvc.rwlock import RWLOCK_LOCK

    if not RWLOCK.is_file():
        return
    with make_lock(str(RWLOCK.with_name(RWLOCK_LOCK)), tmp_dir=str(RWLOCK.parent)):  # as DVC edits it
        table = json.loads(RWLOCK.read_text(encoding="utf-8"))
        alive: dict[str, Any] = {
            "write": {path: holder for path, holder in table.get("write", {}).items() if not is_dead(holder["pid"])},
            "read": {
                path: living
                for path, holders in table.get("read", {}).items()
                if (living := [holder for holder in holders if not is_dead(holder["pid"])])
            },
        }
        if alive != table:
            write_json(RWLOCK, alive)


def is_dead(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def mend() -> None:
    """Put aside what a killed DVC left: half-written files, and locks. Raises StageError for a dvc.lock that somebody
    else broke."""
    for path, what in (
        (RWLOCK, "DVC starts another"),
        (LOCK, "DVC writes it anew, from its cache of runs where it can"),
    ):
        if is_whole(path):
            continue
        time.sleep(0.5)  # a `dvc` started by hand may be writing it just now
        if is_whole(path):
            continue
        if b"<<<<<<<" in path.read_bytes():
            raise StageError(
                f"{path} holds a merge conflict. Choose a side: git checkout --ours {path}, then dvc repro."
            )
        aside = RWLOCK.with_name(f"{path.name}.damaged")
        aside.parent.mkdir(parents=True, exist_ok=True)
        path.replace(aside)
        print(f"{path} was not written to its end, and is now {aside}: {what}.", flush=True)
    release_the_dead()


def main() -> None:
    hold()
    mend()
    ending: set[psutil.Process] = set()  # also those whom DVC, having ended, no longer leads to
    asked = threading.Event()

    def terminate(*_: object) -> None:
        asked.set()
        ending.update(psutil.Process().children(recursive=True))
        for member in ending:
            with suppress(psutil.NoSuchProcess):
                member.terminate()

    signal.signal(signal.SIGTERM, terminate)
    dvc = subprocess.Popen([sys.executable, "-m", "dvc", "repro", *sys.argv[1:]], close_fds=False)  # it holds on, too
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to all of them
    if asked.is_set():  # before there was anyone to tell
        terminate()
    code = dvc.wait()
    while not all(is_dead(member.pid) for member in ending):  # a training saves its step first
        time.sleep(0.1)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    run_stage(main, network=True)  # each stage decides for itself
