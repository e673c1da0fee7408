"""Kill the pipeline at random moments, run it again each time, and compare what it makes with an unbroken run.

SIGKILL goes to the whole process group, as when a machine takes a job away. Whenever the pipeline is done before the
next kill, its outputs are compared, and all is taken away to begin anew. Nothing is ever mended by hand.
Run: `python -m tests.kills --kills 50 --seed 1` (about 20 minutes; `make test-long` runs it, too)
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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

DONE = re.compile(r"Running stage '(\w+)'")


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


def run_with_kills(project: Any, kills: int, seed: int, *target: str, longest: float = 30) -> tuple[Counter, int]:
    """Run `project` to its end again and again until it was killed `kills` times; its outputs must always be the same.

    A kill comes after up to `longest` seconds, at a moment drawn from `seed`. Returns in which stage the kills fell
    (`dvc` between them) and how often the pipeline was compared. Raises AssertionError when a run after a kill fails,
    or when its outputs are others.
    """
    assert project.run("stages.repro", *target)
    expected = locked_outputs(project.folder)
    start_anew(project.folder)
    moments, where, compared = random.Random(seed), Counter[str](), 0
    while True:
        with tempfile.TemporaryFile("w+") as output:
            process = project.start("stages.repro", *target, output=output)
            if where.total() < kills:
                try:
                    process.wait(moments.uniform(0, longest))
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            output.seek(0)
            said = output.read()
        if code == -signal.SIGKILL:
            where[(DONE.findall(said) or ["dvc"])[-1]] += 1
            print(f"kill {where.total()}: in {(DONE.findall(said) or ['dvc'])[-1]}", flush=True)
            continue
        assert code == 0, f"after {where.total()} kills a run failed:\n{said}"
        found = locked_outputs(project.folder)
        different = [path for path in expected if found.get(path) != expected[path]]
        assert not different, f"after {where.total()} kills, other outputs than without: {different}"
        litter = [*project.folder.rglob(".*.partial"), *project.folder.glob("models/checkpoints/*")]
        assert not litter, f"after {where.total()} kills, left over: {litter}"
        compared += 1
        if where.total() >= kills:
            return where, compared
        start_anew(project.folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    from conftest import Project, make_tiny, save_llama

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        project = make_tiny(Project(Path(folder) / "project"), save_llama(Path(folder) / "model"))
        where, compared = run_with_kills(project, given.kills, given.seed)
    print(
        f"{where.total()} kills ({', '.join(f'{n} in {name}' for name, n in where.most_common())}), "
        f"{compared} finished runs, all with the outputs of an unbroken one; {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
