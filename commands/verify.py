"""Run the pipeline twice from nothing, in two other folders, and compare every output with each other and with git.

Reads the project as it stands; writes only to temporary folders (about 3 GB for the embedded recipe). Fails and names
the first output that differs between the two runs. Against the run that is recorded in git's last commit (dvc.lock and
reports/) the same bits are expected on the same kind of machine; on another, a loss curve within 1e-3 nats a token.
Run: `make verify`
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from commands.lockfile import LOCK, outputs, read_lock
from stages.common.errors import StageError
from stages.common.experiments import untracked
from stages.common.params import local_paths, read_params

LOSS = Path("reports/loss")
METRICS = Path("reports/metrics.json")
TOLERANCE = 1e-3  # nats a token
FOLDERS = ("first", "a second, with a longer name")


def first_difference(first: Path, second: Path) -> str | None:
    """The first output, in the order of the stages, that differs between two folders; inside it, the first file."""
    ours, theirs = outputs(read_lock(first)), outputs(read_lock(second))
    for path in ours | theirs:
        if ours.get(path) == theirs.get(path):
            continue
        names = {p.relative_to(folder / path) for folder in (first, second) for p in (folder / path).rglob("*")}
        for name in sorted(names):
            a, b = first / path / name, second / path / name
            if not a.is_dir() and not (a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes()):
                return f"{path}/{name}"
        return path
    return None


def same_question(recorded: dict[str, Any], found: dict[str, Any]) -> bool:
    """Whether two runs had the same parameters, code and sources. Outputs between the stages are not compared."""

    def asked(stages: dict[str, Any]) -> list[Any]:
        made = outputs(stages)
        deps = [
            (dep["path"], dep["md5"])
            for stage in stages.values()
            for dep in stage.get("deps", [])
            if not any(dep["path"] == out or dep["path"].startswith(f"{out}/") for out in made)
        ]
        return [deps, [stage.get("params") for stage in stages.values()]]

    return asked(recorded) == asked(found)


def largest_gap(recorded: Path, found: Path) -> float:
    """The largest difference of loss (nats a token) between two folders: on the held-out data and on the curves of
    training, as far as both have them. Infinite when the curves have different steps.

    Raises StageError when there is nothing to compare.
    """
    gaps = []
    if (recorded / METRICS).is_file() and (found / METRICS).is_file():
        ours, theirs = (json.loads((folder / METRICS).read_text(encoding="utf-8")) for folder in (recorded, found))
        gaps += [abs(math.log(ours[name] / theirs[name])) for name in ("ratio", "ppl")]  # the logarithm is the loss
    for split in ("train", "validation"):
        if (recorded / LOSS / f"{split}.csv").is_file() and (found / LOSS / f"{split}.csv").is_file():
            a, b = (pd.read_csv(folder / LOSS / f"{split}.csv") for folder in (recorded, found))
            gaps.append(float((a["loss"] - b["loss"]).abs().max()) if a["step"].equals(b["step"]) else float("inf"))
    if not gaps:
        raise StageError(f"the recorded run has no losses to compare with: get {LOSS} and {METRICS} from git.")
    return max(gaps)


def verdict(recorded: Path, found: Path) -> str:
    """A sentence that compares a run with the recorded one. Raises StageError when another machine cannot explain the
    difference."""
    ours, theirs = read_lock(recorded), read_lock(found)
    ours = {name: stage for name, stage in ours.items() if name in theirs}
    if "train" not in ours:
        return "There is no recorded run to compare with (dvc.lock in git)."
    if not same_question(ours, theirs):
        return "The recorded run was made with other parameters, code or data: `dvc repro`, and commit what it records."
    different = [path for path, md5 in outputs(ours).items() if outputs(theirs).get(path) != md5]
    if not different:
        return "The run in dvc.lock has the same bits, too."
    first = next(name for name, stage in theirs.items() if different[0] in outputs({name: stage}))
    if list(theirs).index(first) < list(theirs).index("train"):
        raise StageError(
            f"{different[0]} differs from the run in dvc.lock: before training nothing depends on the machine. "
            "Look for what shapes it and is not pinned."
        )
    gap = largest_gap(recorded, found)
    if not gap <= TOLERANCE:
        raise StageError(
            f"the loss differs by {gap:.4f} nats a token from the run in dvc.lock, more than {TOLERANCE}: another "
            f"machine does not explain that. The first output that differs is {different[0]}: look there. "
            "The packages of the recorded run are in requirements.lock."
        )
    return (
        f"The run in dvc.lock has other bits from {different[0]} on, as runs on another kind of machine have; its "
        f"losses are the same within {TOLERANCE} nats a token (largest difference {gap:.6f}): it is the same run."
    )


def recorded_run(source: Path, folder: Path) -> Path:
    """Put what git's last commit records of a run into `folder`: runs since then do not count."""
    for path in (LOCK, Path("dvc.yaml"), METRICS, *(LOSS / f"{split}.csv" for split in ("train", "validation"))):
        shown = subprocess.run(["git", "show", f"HEAD:./{path}"], cwd=source, capture_output=True)
        if shown.returncode == 0:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(shown.stdout)
    return folder


def copy_project(source: Path, target: Path, local: Iterable[Path]) -> None:
    """What git has or would take of `source`, as it stands, in a clone without any output, cache or record; and what
    stands at the paths `local`, which git may ignore."""
    subprocess.run(["git", "clone", "--quiet", str(source), str(target)], check=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=source,
        check=True,
        capture_output=True,
    ).stdout
    private = [name for path in local for name in untracked(source, path)]
    for name in [*filter(None, listed.decode().split("\0")), *private]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
        else:
            (target / name).unlink(missing_ok=True)
    for made in [str(LOCK), *outputs(read_lock(source))]:
        path = target / made
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def check_repository(folder: Path) -> None:
    """Raise StageError unless `folder` is in a git repository with a commit."""
    try:
        found = subprocess.run(["git", "rev-parse", "--verify", "--quiet", "HEAD"], cwd=folder, capture_output=True)
    except FileNotFoundError:
        raise StageError("git is not installed, which `make verify` needs. Install it.") from None
    if found.returncode:
        raise StageError(
            "this folder is no git repository with a commit, so there is nothing to copy and compare with. "
            "Clone the project with git, or run `git init`, `git add --all` and `git commit`."
        )


def main() -> None:
    params = read_params()
    check_repository(Path.cwd())
    source, targets = Path.cwd(), sys.argv[1:]  # stages to run to, as `dvc repro` takes them; none: all
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        runs = [Path(folder) / name for name in FOLDERS]
        for number, run in enumerate(runs, 1):
            print(f"verify: run {number} of {len(runs)}, from nothing, in {run}", flush=True)
            copy_project(source, run, local_paths(params))
            command = ["dvc", "repro", "--no-run-cache", *targets]  # also where projects share a cache
            result = subprocess.run([sys.executable, "-m", *command], cwd=run, env=environment)
            if result.returncode:
                raise StageError(f"run {number} did not finish: see above. Fix that, then `make verify`.")
        if different := first_difference(*runs):
            raise StageError(
                f"{different} differs between two runs from nothing on this machine: its stage is not repeatable. "
                "Look for a seed, an order or a date there; outputs before it are the same."
            )
        print(f"verify: two runs from nothing gave the same {len(outputs(read_lock(runs[0])))} outputs, bit for bit.")
        print(f"verify: {verdict(recorded_run(source, Path(folder) / 'recorded'), runs[0])}")
