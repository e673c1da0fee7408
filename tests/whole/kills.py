"""Kill the pipeline at random moments of all its stages, run it again each time, and compare what it makes in the end.

SIGKILL goes to the whole process group, as when a machine takes a job away; then it is `dvc repro` again, or, where the
kill left DVC's own files in a state that DVC alone cannot work with, what `make all` runs. When each stage had its
kill, the pipeline runs to its end, its outputs are compared with an unbroken run's, and all is taken away to begin
anew. Nothing is ever mended by hand.
Run: `python -m tests.whole.kills --kills 50 --seed 1` (`make test-long` runs it, too)
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).parent))

# What DVC says where a kill has torn its own files, or left locks of processes that nobody collected.
BARRED = re.compile(
    r"is busy|blocked by|Unable to acquire lock|rwlock|dvc\.lock' is invalid|Unable to read|validation failed"
)
RUNNING = re.compile(r"Running stage '(\w+)'")


def locked_outputs(folder: Path) -> dict[str, str]:
    """The md5 of every output in dvc.lock, by path."""
    from ruamel.yaml import YAML

    stages = YAML(typ="safe").load((folder / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}


def start_anew(folder: Path) -> None:
    """Take away all that the pipeline made, and what DVC remembers of it."""
    for name in ("dvc.lock", ".dvc/cache", ".dvc/tmp", *locked_outputs(folder), "models/checkpoints"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def running_stages(output: IO[str]) -> list[str]:
    """The stages that a pipeline writing to `output` has begun."""
    return RUNNING.findall(Path(output.name).read_text(encoding="utf-8"))


def durations(project: Any, target: tuple[str, ...]) -> dict[str, float]:
    """Run the pipeline unbroken; the seconds each stage took, DVC's work after it included, by stage in order."""
    began: dict[str, float] = {}
    with tempfile.NamedTemporaryFile("w+") as output:
        process = project.start("commands.repro", *target, output=output)
        while process.poll() is None:
            for stage in running_stages(output):
                began.setdefault(stage, time.monotonic())
            time.sleep(0.02)
        assert process.returncode == 0, Path(output.name).read_text(encoding="utf-8")
    ends = [*list(began.values())[1:], time.monotonic()]
    return {stage: end - start for (stage, start), end in zip(began.items(), ends, strict=True)}


def run_with_kills(project: Any, kills: int, seed: int, *target: str) -> tuple[Counter, int, int]:
    """Run `project` to its end again and again until it was killed `kills` times; its outputs must always be the same.

    Kills take turns over the stages; each comes at a moment of its stage, or of DVC's work after it, that is drawn from
    `seed`. Returns in which stage the kills fell, how often the pipeline was compared, and how often it took what
    `make all` runs to go on. Raises AssertionError when a run after a kill fails, or when its outputs are others.
    """
    seconds = durations(project, target)
    expected = locked_outputs(project.folder)
    start_anew(project.folder)
    moments, where, compared, mended = random.Random(seed), Counter[str](), 0, 0
    module = ("dvc", "repro")
    waiting: list[str] = []  # the stages whose turn is still to come before the next comparison
    fresh = True
    while True:
        if fresh:
            chosen = moments.sample(list(seconds), min(len(seconds), kills - where.total()))
            waiting = [stage for stage in seconds if stage in chosen]
        fresh, stage = False, waiting.pop(0) if waiting else None
        with tempfile.NamedTemporaryFile("w+") as output:
            process = project.start(*module, *target, output=output)
            while stage is not None and process.poll() is None and stage not in running_stages(output):
                time.sleep(0.02)
            if stage is not None and process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(moments.uniform(0, 1.1 * seconds[stage]))
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            text = Path(output.name).read_text(encoding="utf-8")
        if process.returncode == -signal.SIGKILL:
            last = (RUNNING.findall(text) or ["dvc"])[-1]
            where[last] += 1
            print(f"kill {where.total()}: in {last}", flush=True)
            module = ("dvc", "repro")
            continue
        if process.returncode and module == ("dvc", "repro") and BARRED.search(text):
            module, mended = ("commands.repro",), mended + 1
            print(f"dvc repro cannot go on by itself ({text.strip().splitlines()[-1]})", flush=True)
            if stage is not None:
                waiting.insert(0, stage)  # its kill is still to come
            continue
        assert process.returncode == 0, f"after {where.total()} kills a run failed:\n{text}"
        found = locked_outputs(project.folder)
        different = [path for path in expected if found.get(path) != expected[path]]
        assert not different, f"after {where.total()} kills, other outputs than without: {different}"
        litter = [*project.folder.rglob(".*.partial"), *project.folder.glob("models/checkpoints/*")]
        assert not litter, f"after {where.total()} kills, left over: {litter}"
        compared += 1
        if where.total() >= kills:
            return where, compared, mended
        start_anew(project.folder)
        fresh = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    from tests.support.models import save_llama
    from tests.support.project import Project, make_tiny

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        project = make_tiny(Project(Path(folder) / "project"), save_llama(Path(folder) / "model"))
        where, compared, mended = run_with_kills(project, given.kills, given.seed)
    print(
        f"{where.total()} kills ({', '.join(f'{n} in {name}' for name, n in where.most_common())}), "
        f"{compared} finished runs, all with the outputs of an unbroken one; after {mended} of the kills `dvc repro` "
        f"could not go on by itself, and what `make all` runs could; {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
