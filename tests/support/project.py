"""Copies of the project to run for real, each in a folder and a git repository of its own."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from ruamel.yaml import YAML

from stages.common.pipeline import read_pipeline
from tests.support.rows import small_trees, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
PIPELINE = read_pipeline(ROOT)
STAGES = list(PIPELINE)
RECIPE = ROOT / "recipes/smollm2-cpu.yaml"
SHARED_OASST1 = ROOT.parent / "shared/data/oasst1"

# Some tests check the figures that ship with the embedded recipe. Whoever works with other parameters has others.
ships = pytest.mark.skipif(
    (ROOT / "params.yaml").read_bytes() != RECIPE.read_bytes() and not os.environ.get("CI"),
    reason="params.yaml is not the embedded recipe: its figures are not here",
)

TINY = {
    "base_model": "file:models/local/tiny",
    "base_model_revision": None,
    "dataset": "file:data/local/trees.jsonl",
    "dataset_revision": None,
    "max_length": 128,
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "eval_steps": 2,
    "learning_rate": 0.01,
    "merge_dtype": "float32",
    "bootstrap_samples": 200,
    "stop_prompts": 2,
    "max_new_tokens": 8,
    "export_max_perplexity_increase": 10.0,  # so small a model loses much by 4 bits
}


COMMITTED = "2024-11-20T12:00:00"
COPIED = (
    "Makefile",
    "dvc.yaml",
    ".dvcignore",
    ".gitignore",
    "LICENSE",
    "README.md",
    "requirements.lock",
    "pyproject.toml",
    "stages",
    "commands",
    "space",
    "recipes",
    "data/sample",
    "data/local/README.md",
    "models/README.md",
    "models/local/README.md",
    ".dvc/.gitignore",
    ".dvc/config",
)


def outputs_of(stage: str) -> list[str]:
    """The paths of all that a stage makes, by dvc.yaml."""
    made = PIPELINE.get(stage, {})
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in made.get(kind, [])]
    # An entry with options is a mapping of its path.
    return [path for entry in entries for path in ([entry] if isinstance(entry, str) else entry)]


def stages_run(said: str) -> list[str]:
    """The stages that a `dvc repro` began, by what it said."""
    return re.findall(r"Running stage '(\w+)'", said)


def error_line(result: subprocess.CompletedProcess) -> str:
    """The one error line of a command that failed as expected."""
    said = result.stdout + result.stderr
    assert result.returncode != 0 and "Traceback" not in said, said[-4000:]
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    return line


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


class Project:
    """A folder with a project in a git repository of its own. `python`: what runs its modules, and its stages."""

    def __init__(self, folder: Path, python: Path = Path(sys.executable)) -> None:
        self.folder = folder
        self.python = python
        self.seconds: dict[str, float] = {}  # that each stage of its run took

    @classmethod
    def new(cls, folder: Path) -> "Project":
        """A copy of this project's files, with the embedded recipe."""
        for name in COPIED:
            source, target = ROOT / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copyfile(source, target)
        shutil.copyfile(RECIPE, folder / "params.yaml")
        project = cls(folder)
        project.git("init", "--quiet", "--initial-branch=main")
        (folder / ".git/info/exclude").write_text(".home/\n", encoding="utf-8")
        project.commit("start")
        return project

    def copy(self, folder: Path) -> "Project":
        """The same with all that was made in it, elsewhere."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Project(folder, self.python)

    def git(self, *args: str) -> str:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
        command = ["git", *identity, *args]
        # An old date: DVC shows the day, which is longer than the hour of a commit of today.
        env = {**os.environ, "GIT_AUTHOR_DATE": COMMITTED, "GIT_COMMITTER_DATE": COMMITTED}
        return subprocess.run(command, cwd=self.folder, env=env, check=True, capture_output=True, text=True).stdout

    def commit(self, text: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", text)

    def set(self, **values) -> None:
        """Change keys of params.yaml."""
        set_params(self.folder, **values)

    def remove(self, *names: str) -> None:
        """Remove files and folders that may be there."""
        for name in names:
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def environment(self, **changes: str) -> dict[str, str]:
        """The environment of a user whose git has no identity."""
        home = self.folder / ".home"
        home.mkdir(exist_ok=True)
        return {
            "PATH": os.pathsep.join([str(self.python.parent), str(Path(sys.executable).parent), "/usr/bin", "/bin"]),
            "HOME": str(home),
            "GIT_CONFIG_NOSYSTEM": "1",
            "LANG": "C.UTF-8",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            # What activating the environment lends a user whom git does not know (see the Makefile).
            **{f"GIT_{who}_{what}": "nobody" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
            **changes,
        }

    def start(self, *command: str, output: int | IO = subprocess.PIPE) -> subprocess.Popen:
        """Start `python -m command` (or `make …`) as the head of a process group, as a terminal does; its errors go to
        its output."""
        return subprocess.Popen(
            command if command[0] == "make" else [self.python, "-m", *command],
            cwd=self.folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def make_environment(self) -> None:
        """What `make setup` would make, without an installation: an environment that is this one."""
        python = self.folder / ".venv/bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(str(self.python))} "$@"\n', encoding="utf-8")
        python.chmod(0o755)
        (self.folder / ".venv/installed").touch()

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        """Run `python -m command` in the project, without a terminal."""
        result = subprocess.run(
            [self.python, "-m", *command],
            cwd=self.folder,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if check and result.returncode:
            raise AssertionError(f"{command} failed:\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}")
        return result


def set_params(folder: Path, **values) -> None:
    """Change keys of a folder's params.yaml; where there is none, of the embedded recipe."""
    yaml, path = YAML(), folder / "params.yaml"
    params = yaml.load((path if path.exists() else RECIPE).read_text(encoding="utf-8"))
    params.update(values)
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(params, file)


def timed_repro(project: Project, *target: str) -> tuple[str, dict[str, float]]:
    """What `make all` runs: its output, and the seconds each stage took, DVC's work after it included, in order."""
    began: dict[str, float] = {}
    with tempfile.NamedTemporaryFile("w+") as output:
        process = project.start("commands", "repro", *target, output=output)
        while process.poll() is None:
            for stage in stages_run(Path(output.name).read_text(encoding="utf-8")):
                began.setdefault(stage, time.monotonic())
            time.sleep(0.05)
        said = Path(output.name).read_text(encoding="utf-8")
    assert process.returncode == 0, said[-4000:]
    ends = [*list(began.values())[1:], time.monotonic()]
    return said, {stage: end - start for (stage, start), end in zip(began.items(), ends, strict=True)}


def make_tiny(project: Project, tiny_llama: Path) -> Project:
    """Give `project` a tiny Llama and 40 small trees, so that a complete `dvc repro` takes a minute or two."""
    shutil.copytree(tiny_llama, project.folder / "models/local/tiny")
    write_jsonl(project.folder / "data/local/trees.jsonl", small_trees(40))
    project.set(**TINY)
    project.commit("tiny recipe")
    return project
