"""Every command in every page is one that there is: targets, programs, options, tests and benchmarks."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from dvc.cli import parse_args

from stages.common.schema import Params
from tests.support.pages import COMMANDS, EXAMPLES, INVENTED, PAGES, of, prose, text_of
from tests.support.project import PIPELINE, ROOT
from tests.support.selection import Selection, select

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = dict(re.findall(r"^([a-z-]+):.*## (.*)$", MAKEFILE, re.MULTILINE))
VARIABLES = set(re.findall(r"^([A-Z]+) \?=", MAKEFILE, re.MULTILINE))
# Programs that are not the project's: only that they are named is checked.
OTHER_PROGRAMS = {"cd", "cmake", "curl", "git", "hf", "source", "tar", "/usr/bin/time", "python3"}
OTHER_PROGRAMS |= {".venv/bin/pip", ".venv/bin/python", "build/openvino/bin/pip"}
OTHER_MODULES = {"venv", "timeit", "pip"}


def test_every_program_is_known():
    known = {"make", "dvc", "python", "pytest"} | OTHER_PROGRAMS
    assert {command.words[0] for command in COMMANDS} <= known
    for program in ("make", "dvc", "python", "pytest"):
        assert of(program)


def test_make_targets_and_their_variables_are_there():
    for command in of("make"):
        for word in command.words[1:]:
            name, assigned, _ = word.partition("=")
            assert name in (VARIABLES if assigned else TARGETS), str(command)


def test_every_target_is_in_the_readme():
    assert {word for command in of("make") for word in command.words[1:2] if command.page == "README.md"} == set(
        TARGETS
    )


@pytest.mark.parametrize("command", of("dvc"), ids=str)
def test_dvc_parses_its_commands(command):
    arguments = parse_args(command.words[1:])
    for target in getattr(arguments, "targets", None) or []:
        assert target in {*PIPELINE, *INVENTED, *EXAMPLES} or (ROOT / target).exists(), str(command)
    for override in getattr(arguments, "set_param", None) or []:
        assert override.partition("=")[0] in Params.model_fields.keys() | INVENTED, str(command)


@pytest.mark.parametrize("command", of("python"), ids=str)
def test_modules_and_their_options_are_there(command):
    assert command.words[1] == "-m", str(command)
    module, *arguments = command.words[2:]
    if module in OTHER_MODULES:
        return
    path = ROOT / Path(*module.split("."))
    if path.is_dir():
        names = {file.stem for file in path.glob("*.py")}
        assert arguments[0] in names, str(command)
        path = path / arguments[0]
    code = path.with_suffix(".py").read_text(encoding="utf-8")
    assert '__name__ == "__main__"' in code or "\ndef main()" in code, str(command)
    for option in (word for word in arguments if word.startswith("--")):
        assert f'"{option}"' in code, f"{command}: {module} has no {option}"


@pytest.mark.slow
def test_every_pytest_command_selects_a_test(warm_python):
    """All of them in one collection: collecting takes longer than anything else here."""
    options = [" ".join(shlex.quote(word) for word in command.words[1:]) for command in of("pytest")]
    options += [path for page in PAGES for path in re.findall(r"`(tests/[\w/]+\.py)`", prose(page)) if "test_" in path]
    options = [option for option in options if option not in EXAMPLES]
    for option, count in select([Selection.of(option) for option in options], warm_python).items():
        assert count, f"pytest {option} selects no test"


def test_make_alone_prints_every_target_and_does_nothing():
    outside = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    result = subprocess.run(["make"], cwd=ROOT, env=outside, capture_output=True, text=True, check=True)
    assert [tuple(line.split(None, 2)[1:]) for line in result.stdout.splitlines()] == list(TARGETS.items())


def test_activating_lends_git_an_identity_only_where_there_is_none(tmp_path):
    activate = ROOT / ".venv/bin/activate"
    if not activate.exists():
        pytest.skip("the environment was not made by make")
    script = f'source "{activate}"; echo "$GIT_AUTHOR_NAME $GIT_COMMITTER_EMAIL"'

    def activated(config: str) -> str:
        (tmp_path / ".gitconfig").write_text(config)
        env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "USER": "ada", "GIT_CONFIG_NOSYSTEM": "1"}
        return subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True
        ).stdout.strip()

    assert activated("") == "ada ada@localhost"
    assert activated("[user]\nname = Ada\nemail = ada@example.com\n") == ""


def test_every_benchmark_is_named():
    named = {module for page in PAGES for module in re.findall(r"python -m bench\.(\w+)", text_of(page))}
    made = {path.stem for path in (ROOT / "bench").glob("*.py") if "Run: `python -m" in path.read_text("utf-8")}
    assert named == made
