"""The documentation is true: parameters, commands and files that README.md names are there, and all are named."""

import os
import re
import subprocess

import pytest
from ruamel.yaml import YAML

from stages.common.params import Params, read_params
from tests.support.project import ROOT, ships

README = (ROOT / "README.md").read_text(encoding="utf-8")


def parameter_table() -> str:
    """The table of parameters as README.md must show it: name, value of each recipe, meaning."""
    ours, reference = (read_params(ROOT / f"recipes/{name}.yaml") for name in ("smollm2-cpu", "phi2-oasst1"))
    lines = ["| parameter | smollm2-cpu | phi2-oasst1 | meaning |", "| --- | --- | --- | --- |"]
    for name, field in Params.model_fields.items():
        values = [shown(getattr(params, name)) for params in (ours, reference)]
        lines.append(f"| {name} | {values[0]} | {values[1]} | {field.description} |")
    return "\n".join(lines)


def shown(value) -> str:
    """A value as the table shows it; long ones are cut."""
    if value is None or value == []:
        return "all" if value == [] else "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = ", ".join(value) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else text[:39] + "…"


def test_the_table_of_parameters_is_true():
    assert parameter_table() in README, "write this table into README.md:\n" + parameter_table()


def test_every_make_target_is_in_the_readme_and_every_named_one_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", README)) | set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
    assert named == targets


def test_make_alone_prints_every_target_and_does_nothing():
    outside = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    result = subprocess.run(["make"], cwd=ROOT, env=outside, capture_output=True, text=True, check=True)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):.*## (.*)$", makefile, re.MULTILINE)
    assert [line.split(None, 2)[1:] for line in result.stdout.splitlines()] == [list(target) for target in targets]


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:stages|data|models|reports|recipes|tests)/[\w./-]+)`", README)))
)
def test_files_that_the_readme_names_are_there(path):
    made = [
        next(iter(out)) if isinstance(out, dict) else out
        for stage in YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"].values()
        for key in ("outs", "metrics", "plots")
        for out in stage.get(key, [])
    ]
    known = (ROOT / path).exists() or any(path.rstrip("/").startswith(out) or out.startswith(path) for out in made)
    assert known or path.startswith("models/checkpoints")


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
    for stage in YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]:
        assert f"`{stage}`" in README or f"**{stage}**" in README
        docstring = (ROOT / f"stages/{stage}.py").read_text(encoding="utf-8").split('"""')[1]
        assert f"`dvc repro {stage}`" in docstring


@ships
def test_the_figures_in_the_readme_are_those_in_git():
    from commands.summary import exported, table
    from stages.common.artifacts import read_json

    for line in [*table(read_json(ROOT / "reports/metrics.json")), exported(read_json(ROOT / "reports/export.json"))]:
        assert line in README, f"README.md does not show: {line}"


def test_every_benchmark_and_test_that_is_named_is_there_and_all_benchmarks_are_named():
    named = set(re.findall(r"`python -m (bench|tests)\.(\w+)", README))
    for package, module in named:
        assert (ROOT / package / f"{module}.py").is_file(), module
    commands = {path.stem for path in (ROOT / "bench").glob("*.py") if "Run: `python -m" in path.read_text("utf-8")}
    assert commands == {module for package, module in named if package == "bench"}
    for expression in re.findall(r"`pytest [^`]*-k ['\"]?([\w ]+?)['\"]?(?: tests/\w+\.py)?`", README):
        tests = " ".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
        for word in expression.split(" or "):
            assert re.search(rf"def test_\w*{word}", tests), word


def test_nothing_names_a_machine_or_a_package_host():
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        path = ROOT / name
        if path.suffix in {".jsonl", ".png"} or not path.is_file() or path.name == "test_docs.py":
            continue
        text = path.read_text(encoding="utf-8")
        assert str(ROOT) not in text and "index-url" not in text, name
