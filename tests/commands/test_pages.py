"""The pages are true: commands parse, files, links, tests and parameters that they name are there."""

import math
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
from dvc.cli import parse_args
from ruamel.yaml import YAML

from commands.summary import exported, table
from stages.common.artifacts import read_json
from stages.common.pipeline import paths_of, read_pipeline
from stages.common.schema import Params
from tests.support.project import ROOT, ships
from tests.support.selection import Selection, select

MAX_README_BYTES = 9000
README = ROOT / "README.md"
PAGES = sorted([README, *ROOT.glob("docs/*.md"), *ROOT.glob("data/*/README.md"), ROOT / "models/README.md"])
PIPELINE = read_pipeline(ROOT)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = dict(re.findall(r"^([a-z-]+):.*## (.*)$", MAKEFILE, re.MULTILINE))
VARIABLES = set(re.findall(r"^([A-Z]+) \?=", MAKEFILE, re.MULTILINE))

# Programs that are not the project's: only that they are named is checked.
OTHER_PROGRAMS = {"cd", "curl", "git", "hf", "source", "/usr/bin/time", ".venv/bin/pip", ".venv/bin/python", "python3"}
OTHER_MODULES = {"venv", "timeit", "pip"}
# Names of the walk-throughs in docs/contributing.md: a stage and a parameter that a reader would add.
INVENTED = {"judge", "use_dora"}
# Files that a page asks a reader to make, or that a command makes; and examples.
MADE = ("build/", "models/checkpoints", "recipes/previous", "stages/templates/NAME.jinja")
EXAMPLES = {
    "data/local/mine.jsonl",
    "data/local/mine.jsonl.dvc",
    "data/local/conversations.jsonl",
    "models/local/mine",
    "stages/judge.py",
    "tests/stages/test_judge.py",
    "owner/name",
    "owner/name/path/in/repository",
    "user/name",
}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def split(line: str) -> list[list[str]]:
    """The commands of a shell line, as words, without comments."""
    words = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    words.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in words:
        if set(word) <= set(";&|"):
            commands.append([])
        else:
            commands[-1].append(word)
    return [command for command in commands if command]


class Command(NamedTuple):
    """A command as a page names it: its words."""

    page: str
    words: list[str]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def commands() -> list[Command]:
    """All commands of bash blocks, and those in code spans that begin as the project's commands do."""
    found = []
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                found += [Command(name, words) for words in split(line)]
        for span in re.findall(r"`((?:make|dvc|python -m|pytest) [^`]+)`", prose(page)):
            if "…" not in span:
                found += [Command(name, words) for words in split(span)]
    return found


COMMANDS = commands()


def of(program: str) -> list[Command]:
    return [command for command in COMMANDS if command.words[0] == program]


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
def test_every_pytest_command_selects_a_test():
    """All of them in one collection: collecting takes longer than anything else here."""
    options = [" ".join(shlex.quote(word) for word in command.words[1:]) for command in of("pytest")]
    options += [path for page in PAGES for path in re.findall(r"`(tests/[\w/]+\.py)`", prose(page)) if "test_" in path]
    options = [option for option in options if option not in EXAMPLES]
    for option, count in select([Selection.of(option) for option in options]).items():
        assert count, f"pytest {option} selects no test"


def outputs() -> set[str]:
    return {
        path
        for stage in PIPELINE.values()
        for path in paths_of([out for key in ("outs", "metrics", "plots") for out in stage.get(key, [])])
    }


def is_there(name: str) -> bool:
    made = outputs()
    path = name.rstrip("/")
    return (
        (ROOT / path).exists()
        or any(path == out or path.startswith(f"{out}/") or out.startswith(f"{path}/") for out in made)
        or path.startswith(MADE)
        or f"{path}/".startswith(MADE)
        or path in EXAMPLES
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page):
    folders = "stages|commands|space|bench|tests|data|models|reports|recipes|docs|build"
    named = re.findall(rf"`((?:{folders})(?:/[\w.*{{}},-]+)*/?)`", prose(page))
    for block in blocks(page, "bash"):
        named += re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]+)", block)
    missing = [name for name in named if "/" in name and not is_there(name)]
    assert not missing, f"{page.relative_to(ROOT)} names what is not there: {missing}"


def test_the_tree_of_folders_in_the_readme_is_the_one_that_is_there():
    (tree,) = [block for block in blocks(README, "text") if "dvc.yaml  " in block]
    parent = ""
    for line in tree.splitlines():
        for name in re.findall(r"[\w./]+", re.split(r" {2,}(?=\S)", line.strip())[0]):
            if line.startswith("  "):
                assert (ROOT / parent / name).is_dir(), line
            else:
                parent = name
                assert is_there(name), line


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+://", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{page.relative_to(ROOT)}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(linked), re.MULTILINE)
            assert anchor in [slug(heading) for heading in headings], f"{page.relative_to(ROOT)}: {target}"


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", text_of(README)))
    assert linked == {str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_parameters_in_examples_are_there(page):
    for block in blocks(page, "yaml"):
        assert YAML(typ="safe").load(block).keys() <= Params.model_fields.keys(), block


def test_the_readme_is_two_screens():
    assert README.stat().st_size <= MAX_README_BYTES


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


def test_every_stage_is_in_the_readme_and_opens_with_how_to_run_it():
    for stage in PIPELINE:
        assert f"**{stage}**" in text_of(README)
        docstring = (ROOT / f"stages/{stage}.py").read_text(encoding="utf-8").split('"""')[1]
        assert f"`dvc repro {stage}`" in docstring


@ships
def test_the_figures_in_the_readme_are_those_in_git():
    readme, metrics = text_of(README), read_json(ROOT / "reports/metrics.json")
    losses = [math.log(metrics[name]) for name in ("base", "ppl")]
    low, high = (math.log(metrics[name]) for name in ("lo", "hi"))
    lines = [
        f"  {'perplexity':38}{metrics['base']:>9.2f}{metrics['ppl']:>9.2f}",
        f"  {'loss (nats a token)':38}{losses[0]:>9.3f}{losses[1]:>9.3f}",
        f"  difference of loss {losses[1] - losses[0]:+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}]: it excludes zero",
    ]
    conversations = pd.read_csv(ROOT / "reports/conversations.csv")
    lines.append(f"{len(conversations)} held-out conversations, {conversations['tokens'].sum()} tokens:")
    if (ROOT / "reports/evaluation.json").exists():  # kept by DVC, not by git
        lines += table(read_json(ROOT / "reports/evaluation.json"))
        lines.append(exported(read_json(ROOT / "reports/exported.json")))
    for line in lines:
        assert line in readme, f"README.md does not show: {line}"
    export = read_json(ROOT / "reports/export.json")
    assert f"{export['mb']:.0f} MB, perplexity {export['cpu_ppl']:.2f}" in readme


def test_every_benchmark_is_named():
    named = {module for page in PAGES for module in re.findall(r"python -m bench\.(\w+)", text_of(page))}
    made = {path.stem for path in (ROOT / "bench").glob("*.py") if "Run: `python -m" in path.read_text("utf-8")}
    assert named == made


def test_nothing_names_a_machine_or_a_package_host():
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        path = ROOT / name
        if path.suffix in {".jsonl", ".png"} or not path.is_file() or path == Path(__file__):
            continue
        text = path.read_text(encoding="utf-8")
        assert str(ROOT) not in text and "index-url" not in text, name
