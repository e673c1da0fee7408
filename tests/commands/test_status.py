"""`make status`: what would run, and the last summary; a wrong parameter first, and alone."""

import re
import subprocess
import sys

import pytest

from tests.support.project import RECIPE, error_line

WRONG = {
    "a misspelt key": ("learning_rate:", "lerning_rate:", "is not a parameter; did you mean learning_rate?"),
    "an indented key": ("learning_rate:", "  learning_rate:", "line LINE is not valid YAML: it is indented; each key"),
    "a tab": ("learning_rate:", "\tlearning_rate:", "line LINE is not valid YAML: it is indented; each"),
    "a path without file:": ("dataset: ", "dataset: data/local/mine.jsonl # ", "write file:data/local/mine.jsonl"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_parameter_is_all_that_is_said(case, project):
    find, replace, said = WRONG[case]
    text = RECIPE.read_text(encoding="utf-8")
    changed = re.sub(rf"^{find}", replace, text, count=1, flags=re.MULTILINE)
    (project.folder / "params.yaml").write_text(changed, encoding="utf-8")
    number = 1 + changed[: changed.index(replace)].count("\n")
    result = project.run("commands", "status", check=False)
    assert said.replace("LINE", str(number)) in error_line(result), error_line(result)
    assert result.stdout == "" and len(result.stderr.splitlines()) <= 2, result.stderr


@pytest.mark.slow
def test_the_stages_that_would_run_stand_before_the_summary(finished_project):
    said = finished_project.run("commands", "status").stdout
    assert "up to date" in said and "perplexity" in said.partition("up to date")[2]
    assert "of the runs before" not in said
    finished_project.set(seed=7)
    said = finished_project.run("commands", "status").stdout
    changed, _, figures = said.partition("What follows is of the runs before.")
    assert "seed" in changed and "perplexity" in figures


@pytest.mark.slow
def test_output_that_nobody_reads_on_is_no_traceback(finished_project):
    command = f"'{sys.executable}' -m commands status | head -n 1"
    settings = {"cwd": finished_project.folder, "env": finished_project.environment()}
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, **settings)
    assert result.stdout and result.stderr == ""
