"""The commands of the pages run: the quick ones in `make test`, those that take minutes in `make test-long`.

A command that neither runs has its reason here; tests/commands/test_page_commands.py checks that it parses.
"""

import shlex
import subprocess

import pytest

from tests.support.pages import COMMANDS
from tests.support.project import Project

MAX_SECONDS = 300  # of a command: one that waits for ever is named
# In this order, in a copy of the finished project.
QUICK = """
make help
make docs
make recipe NAME=phi2-oasst1
make recipe NAME=phi2-oasst1-best
make recipe NAME=smollm2-cpu
make clean
make space
make deploy SPACE=user/name DRY=1
dvc metrics diff
"""
# In this order, each with what the ones before it left. The experiment `slower` is that of a text block.
MINUTES = """
dvc repro
make status
dvc exp show
dvc params diff
dvc repro fetch_model
dvc repro tokenize
dvc repro train
make plan
python -m commands plan
python -m stages train
git checkout params.yaml dvc.lock reports
dvc checkout
dvc exp run --name slower -S learning_rate=1e-4
dvc exp run -S learning_rate=2e-3 -S max_steps=40 -S gradient_accumulation_steps=2 -S max_new_tokens=256
dvc exp run -S repetition_penalty=1.1
dvc exp show --only-changed
dvc plots show
dvc plots diff
dvc exp apply slower
dvc exp branch slower slower-run
dvc exp remove slower
git checkout params.yaml dvc.lock reports
dvc checkout
dvc exp run --name rank -S lora_r=32
dvc exp run -S learning_rate=1e-4
dvc exp run -S merge_base=dequantized
dvc exp run -S merge_base=original
dvc exp run
dvc queue status
dvc remote add --default storage s3://our-bucket/qlora-chat
dvc remote modify storage endpointurl https://our-server
"""
# Why a command runs in neither list, by its first words.
ELSEWHERE = {
    "make all": "tests/whole/test_two_at_once.py",
    "make PYTHON=python3.11 all": "needs another Python",
    "make serve": "tests/whole/test_serve.py",
    "make chat": "tests/space/test_chat.py",
    "make deploy": "tests/commands/test_deployed.py",
    "make verify": "tests/commands/test_verify.py",
    "make test": "these tests",
    "make lint": "needs minutes; it has no state",
    "make lock": "needs a package index",
    "dvc queue start": "tests/whole/test_two_at_once.py",
    "dvc exp run --queue": "tests/whole/test_two_at_once.py",
    "dvc exp run -S 'dataset": "needs the hub: tests/whole/test_hub.py",
    "dvc exp run -S base_model": "needs the hub: tests/whole/test_hub.py",
    "dvc repro judge": "tests/whole/test_walkthroughs.py",
    "dvc repro merge": "half of an experiment; a stage alone: tests/whole/test_experiments.py",
    "dvc push": "tests/whole/test_remote.py",
    "dvc add": "tests/whole/test_experiments.py",
    "dvc exp run -S truncation_side": "tests/stages/test_truncation.py",
    "dvc exp run -S seed": "each key alone: tests/commands/test_docs.py",
    "dvc exp run -S max_turns": "an earlier recipe; each key alone: tests/commands/test_docs.py",
    "make check": "tests/commands/test_check.py",
    "python -m tests.support.templates": "tests/stages/test_templates.py",
    "dvc pull": "tests/whole/test_remote.py",
    "python -m bench": "needs the outputs of make all, and minutes",
    "python -m tests.whole.kills": "tests/whole/test_kills.py",
    "python -m venv": "Python's own",
    "python -m timeit": "Python's own",
}


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


def run(project: Project, line: str) -> None:
    words = shlex.split(line)
    command = [str(project.python), *words[1:]] if words[0] == "python" else words
    result = subprocess.run(
        command,
        cwd=project.folder,
        env=project.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=MAX_SECONDS,
    )
    assert result.returncode == 0, f"{line}:\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    assert "Traceback" not in result.stdout + result.stderr, line


def test_each_command_runs_here_or_has_its_reason():
    named = {shlex.join(c.words) for c in COMMANDS if c.words[0] in ("make", "dvc", "python")}
    here = {shlex.join(shlex.split(line)) for line in lines(QUICK) + lines(MINUTES)}
    others = {name for name in named - here if name.startswith(tuple(ELSEWHERE))}
    assert named - here - others == set(), "run it in QUICK or MINUTES, or say in ELSEWHERE why not"
    unused = [start for start in ELSEWHERE if not any(name.startswith(start) for name in others)]
    assert not unused, f"no page names these any more: {unused}"
    by_hand = {"dvc exp run --name slower -S learning_rate=1e-4", "git checkout params.yaml dvc.lock reports"}
    assert here - named <= by_hand, "no page names these any more"


@pytest.mark.slow
def test_the_quick_commands_run(finished_project):
    finished_project.make_environment()
    for line in lines(QUICK):
        run(finished_project, line)
    assert (finished_project.folder / "build/space/app.py").is_file()
    assert (finished_project.folder / "docs/parameters.md").is_file()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_commands_that_take_minutes_run(finished_project):
    finished_project.make_environment()
    for line in lines(MINUTES):
        run(finished_project, line)
