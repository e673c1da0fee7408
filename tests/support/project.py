"""Copies of the project to run for real, each in a folder and a git repository of its own."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
from ruamel.yaml import YAML

from tests.support.rows import small_trees, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes/smollm2-cpu.yaml"
SHARED_OASST1 = ROOT.parent / "shared/data/oasst1"

# Some tests check the figures that ship with the embedded recipe. Whoever works with other parameters has others.
ships = pytest.mark.skipif(
    (ROOT / "params.yaml").read_bytes() != RECIPE.read_bytes() and not os.environ.get("CI"),
    reason="params.yaml is not the embedded recipe: its figures are not here",
)

TINY = {
    "base_model": "file:data/local/tiny",
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


class Project:
    """A copy of the project's files in a folder and git repository of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tracked = ["Makefile", "dvc.yaml", ".dvcignore", ".gitignore", "LICENSE", "README.md", "requirements.lock"]
        for name in (
            *tracked,
            "pyproject.toml",
            "stages",
            "commands",
            "space",
            "recipes",
            "data/sample",
            "data/local",
            "models/README.md",
            ".dvc/config",
        ):
            source, target = ROOT / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copyfile(source, target)
        shutil.copyfile(RECIPE, folder / "params.yaml")
        self.git("init", "--quiet", "--initial-branch=main")
        self.commit("start")

    def git(self, *args: str) -> None:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
        subprocess.run(["git", *identity, *args], cwd=self.folder, check=True, capture_output=True)

    def commit(self, text: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", text)

    def set(self, **values) -> None:
        """Change keys of params.yaml."""
        yaml, path = YAML(), self.folder / "params.yaml"
        params = yaml.load(path.read_text(encoding="utf-8"))
        params.update(values)
        with path.open("w", encoding="utf-8") as file:
            yaml.dump(params, file)

    def environment(self, **changes: str) -> dict[str, str]:
        """The environment of a user whose git has no identity."""
        home = self.folder / ".home"
        home.mkdir(exist_ok=True)
        return {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"]),
            "HOME": str(home),
            "GIT_CONFIG_NOSYSTEM": "1",
            "LANG": "C.UTF-8",
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            # What activating the environment lends a user whom git does not know (see the Makefile).
            **{f"GIT_{who}_{what}": "nobody" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
            **changes,
        }

    def start(self, *command: str, output: int | IO = subprocess.PIPE) -> subprocess.Popen:
        """Start `python -m command` (or `make …`) as the head of a process group, as a terminal does; its errors go to
        its output."""
        return subprocess.Popen(
            command if command[0] == "make" else [sys.executable, "-m", *command],
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
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', encoding="utf-8")
        python.chmod(0o755)
        (self.folder / ".venv/installed").touch()

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        """Run `python -m command` in the project, without a terminal."""
        result = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self.folder,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if check and result.returncode:
            raise AssertionError(f"{command} failed:\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}")
        return result


def make_tiny(project: Project, tiny_llama: Path) -> Project:
    """Give `project` a tiny Llama and 40 small trees, so that a whole `dvc repro` takes a minute."""
    shutil.copytree(tiny_llama, project.folder / "data/local/tiny")
    write_jsonl(project.folder / "data/local/trees.jsonl", small_trees(40))
    project.set(**TINY)
    project.commit("tiny recipe")
    return project
