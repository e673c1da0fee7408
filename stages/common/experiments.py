"""What an experiment with --temp or --queue lacks: its own folder has only what git and DVC track."""

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from stages.common.errors import StageError

FOLDERS = Path(".dvc/tmp/exps")  # where DVC puts the folders of such experiments
LOCAL = (Path("data/local"), Path("models/local"))


def project_of_experiment() -> Path | None:
    """The project whose experiment has this folder for its own; None in a project itself."""
    project = Path(os.environ.get("DVC_ROOT", ".")).resolve()  # DVC sets it for its stages
    return project if Path.cwd().resolve().is_relative_to(project / FOLDERS) else None


def untracked(project: Path, path: Path) -> list[str]:
    """The files at `path` in a project that git does not track, ignored ones included."""
    command = ["git", "ls-files", "-z", "--others", "--", str(path)]
    listed = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name]


def check_sources(paths: Iterable[Path]) -> None:
    """Raise StageError when this is an experiment's folder, and a file at one of `paths` is only in the project."""
    if (project := project_of_experiment()) is None:
        return
    for path in paths:
        missing = [name for name in untracked(project, path) if not Path(name).exists()]
        if missing:
            others = f" (and {len(missing) - 1} more files of {path})" if len(missing) > 1 else ""
            raise StageError(
                f"{missing[0]}{others} is not in this experiment's folder: with --temp and --queue, DVC copies only "
                f"tracked files. Run {remedy(project, path)}, then the experiment again."
            )


def remedy(project: Path, path: Path) -> str:
    """How to have a source tracked: by DVC all that stands directly in data/local or models/local, or by git."""
    for folder in LOCAL:
        if path.is_relative_to(folder) and path != folder:
            path = folder / path.relative_to(folder).parts[0]
    pointer = f"{path}.dvc"
    if (project / pointer).exists():
        return f"`git add {pointer}`"
    return f"`dvc add {path}` and `git add {pointer}`, or `git add --force {path}`"
