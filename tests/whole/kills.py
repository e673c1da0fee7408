"""Kill the pipeline at random moments of all its stages, run it again each time, and compare what it makes in the end.

SIGKILL goes to the whole process group, as when a machine takes a job away; then it is `dvc repro` again, or, where the
kill left DVC's own files in a state that DVC alone cannot work with, what `make all` runs. When each stage had its
kill, the pipeline runs to its end, its outputs are compared with an unbroken run's, and all is removed to begin
again. Nothing is ever fixed by hand.
Run: `python -m tests.whole.kills --kills 50 --seed 1` (`make test-long` runs it, too)
"""

import argparse
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from commands.lockfile import outputs, read_lock
from tests.support.models import save_llama
from tests.support.project import Project, make_tiny, stages_run, timed_repro

# What DVC says where a kill has torn its own files, or left locks of processes that nobody collected.
BARRED = re.compile(
    r"is busy|blocked by|Unable to acquire lock|rwlock|dvc\.lock' is invalid|Unable to read|validation failed"
)


@dataclass(frozen=True)
class Unbroken:
    """A run without kills: how long each stage took, DVC's work after it included, and the md5 of its outputs."""

    seconds: dict[str, float]
    outputs: dict[str, str]


def locked_outputs(folder: Path, stages: Iterable[str] | None = None) -> dict[str, str]:
    """The md5 of every output in dvc.lock, or of some stages' outputs, by path."""
    lock = read_lock(folder)
    return outputs({name: stage for name, stage in lock.items() if stages is None or name in stages})


def start_again(project: Project) -> None:
    """Take away all that the pipeline made, and what DVC remembers of it."""
    made = locked_outputs(project.folder)
    project.remove("dvc.lock", ".dvc/cache", ".dvc/tmp", *made, "models/checkpoints")


class Killing:
    """A project that runs to its end again and again, and is killed on the way. `moments` draws when."""

    def __init__(self, project: Project, unbroken: Unbroken, seed: int, target: tuple[str, ...]) -> None:
        self.project = project
        self.unbroken = unbroken
        self.moments = random.Random(seed)
        self.target = target
        self.where = Counter[str]()  # in which stage the kills fell
        self.compared = 0
        self.repaired = 0
        self.module: tuple[str, ...] = ("dvc", "repro")

    def run(self, stage: str | None) -> tuple[int, str]:
        """Run the pipeline, and kill it at a moment of `stage` or of DVC's work after it; its status and output."""
        with tempfile.NamedTemporaryFile("w+") as output:
            process = self.project.start(*self.module, *self.target, output=output)

            def said() -> str:
                return Path(output.name).read_text(encoding="utf-8")

            while stage is not None and process.poll() is None and stage not in stages_run(said()):
                time.sleep(0.02)
            if stage is not None and process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(self.moments.uniform(0, 1.1 * self.unbroken.seconds[stage]))
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            return process.wait(), said()

    def to_the_end(self, waiting: list[str]) -> None:
        """Run until the pipeline ends, with a kill in each stage of `waiting`; compare its outputs."""
        while True:
            stage = waiting.pop(0) if waiting else None
            status, said = self.run(stage)
            if status == -signal.SIGKILL:
                self.where[(stages_run(said) or ["dvc"])[-1]] += 1
                print(f"kill {self.where.total()}: in {(stages_run(said) or ['dvc'])[-1]}", flush=True)
                self.module = ("dvc", "repro")
            elif status and self.module == ("dvc", "repro") and BARRED.search(said):
                self.module, self.repaired = ("commands", "repro"), self.repaired + 1
                print(f"dvc repro cannot continue by itself ({said.strip().splitlines()[-1]})", flush=True)
                if stage is not None:
                    waiting.insert(0, stage)  # its kill is still to come
            else:
                assert status == 0, f"after {self.where.total()} kills a run failed:\n{said}"
                self.compare()
                return

    def compare(self) -> None:
        found, kills = locked_outputs(self.project.folder), self.where.total()
        different = [path for path, md5 in self.unbroken.outputs.items() if found.get(path) != md5]
        assert not different, f"after {kills} kills, other outputs than without: {different}"
        folder = self.project.folder
        litter = [*folder.rglob(".*.partial"), *folder.glob("models/checkpoints/*")]
        assert not litter, f"after {kills} kills, left over: {litter}"
        self.compared += 1


def run_with_kills(
    project: Project, kills: int, seed: int, target: tuple[str, ...] = (), unbroken: Unbroken | None = None
) -> tuple[Counter[str], int, int]:
    """Run `project` to its end again and again until it was killed `kills` times; its outputs must always be the same.

    Kills take turns over the stages; each comes at a moment that is drawn from `seed`. Without a record of an unbroken
    run one is made first. Returns in which stage the kills fell, how often the pipeline was compared, and how often it
    needed what `make all` runs. Raises AssertionError when a run after a kill fails, or when its outputs are
    others.
    """
    if unbroken is None:
        seconds = timed_repro(project, *target)[1]
        unbroken = Unbroken(seconds, locked_outputs(project.folder))
    killing = Killing(project, unbroken, seed, target)
    while killing.where.total() < kills:
        start_again(project)
        stages = list(unbroken.seconds)
        chosen = killing.moments.sample(stages, min(len(stages), kills - killing.where.total()))
        killing.to_the_end([stage for stage in stages if stage in chosen])
    return killing.where, killing.compared, killing.repaired


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        project = make_tiny(Project.new(Path(folder) / "project"), save_llama(Path(folder) / "model"))
        where, compared, repaired = run_with_kills(project, given.kills, given.seed)
    print(
        f"{where.total()} kills ({', '.join(f'{n} in {name}' for name, n in where.most_common())}), "
        f"{compared} finished runs, all with the outputs of an unbroken one; after {repaired} of the kills `dvc repro` "
        f"could not continue by itself, and what `make all` runs could; {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
