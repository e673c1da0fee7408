"""The walk-throughs of docs/contributing.md: what they change is enough, in a copy of the project."""

import json
import shutil

import pandas as pd
import pytest

from tests.support.project import ROOT, Project, stages_run
from tests.support.rows import message, small_trees, write_jsonl
from tests.support.walkthroughs import apply, walkthrough

FILTER, FORM, METRIC, VARIANT = "Add a filter", "Add a form of data", "Add a metric", "Add a LoRA variant"
ALSO = ("docs", "tests", "bench")  # what a project's copy for a pipeline lacks


def changed(project: Project, heading: str) -> Project:
    for name in ALSO:
        shutil.copytree(ROOT / name, project.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    apply(walkthrough(heading), project.folder)
    project.run("commands", "docs")
    project.run("commands", "docs", "--check")
    return project


def test_the_files_of_a_walk_through_are_in_its_table():
    text = (ROOT / "docs/contributing.md").read_text(encoding="utf-8")
    for heading in (FILTER, FORM, METRIC, VARIANT):
        section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        table = "".join(line for line in section.splitlines() if line.startswith("|"))
        assert all(f"`{name}`" in table for name in walkthrough(heading))


@pytest.mark.slow
@pytest.mark.long
def test_a_new_filter_filters(tiny_project):
    project = changed(tiny_project, FILTER)
    assert "min_characters" in (project.folder / "docs/parameters.md").read_text(encoding="utf-8")
    rows = [message("s", role="prompter", text="Short?"), message("s.a", "s", text="Yes.")]
    write_jsonl(project.folder / "data/local/trees.jsonl", [*small_trees(40), *rows])
    project.run("dvc", "repro", "prepare")

    def dropped() -> dict:
        return json.loads((project.folder / "reports/funnel.json").read_text(encoding="utf-8"))["dropped"]

    assert "too_short" not in dropped()
    said = project.run("dvc", "exp", "run", "prepare", "-S", "min_characters=5").stdout
    assert "Running stage 'prepare'" in said and "Running stage 'fetch'" not in said
    assert dropped()["too_short"]["messages"] == 1
    tests = ["tests/stages/test_filters.py", "tests/stages/test_params.py", "tests/commands/test_docs.py"]
    project.run("pytest", "-p", "no:cacheprovider", "-m", "not slow", *tests)


@pytest.mark.slow
@pytest.mark.long
def test_a_new_form_is_read(tiny_project):
    project = changed(tiny_project, FORM)
    turns = [
        [{"role": "user", "content": f"What is {i} + 1?"}, {"role": "assistant", "content": f"It is {i + 1}."}]
        for i in range(8)
    ]
    write_jsonl(project.folder / "data/local/trees.jsonl", [{"dialog": each} for each in turns])
    project.run("dvc", "repro", "prepare")
    read = json.loads((project.folder / "reports/funnel.json").read_text(encoding="utf-8"))["read"]
    assert read["messages"] == 16 and read["trees"] == 8
    kept = [pd.read_parquet(project.folder / f"data/prepared/{split}.parquet") for split in ("train", "validation")]
    found = [[dict(turn) for turn in messages[-2:]] for messages in pd.concat(kept)["messages"]]
    assert sorted(found, key=str) == sorted(turns, key=str)
    project.run("pytest", "-p", "no:cacheprovider", "tests/stages/test_forms.py")


@pytest.mark.slow
@pytest.mark.long
def test_a_new_metric_is_in_the_report(finished_project):
    project = changed(finished_project, METRIC)
    assert stages_run(project.run("dvc", "repro", "evaluate").stdout) == ["evaluate"]
    answers = json.loads((project.folder / "reports/evaluation.json").read_text(encoding="utf-8"))["answers"]
    assert all(0 <= answers[name]["empty"] <= 1 for name in ("references", "base", "tuned"))
    project.run("pytest", "-p", "no:cacheprovider", "tests/stages/test_answers.py")


@pytest.mark.slow
@pytest.mark.long
def test_a_new_lora_variant_is_trained_merged_and_planned(tiny_project):
    project = changed(tiny_project, VARIANT)
    project.run("dvc", "repro", "fetch")
    line = {}
    for used in (False, True):
        project.set(use_dora=used)
        said = project.run("commands", "plan", "--no-probe").stdout
        (line[used],) = [part for part in said.splitlines() if part.startswith("  weights ")]
    # A magnitude for each output of each adapted layer.
    count = {used: int(text.split("base, ")[1].split(" ")[0].replace(",", "")) for used, text in line.items()}
    assert count[True] > count[False]
    project.run("pytest", "-p", "no:cacheprovider", "tests/stages/test_merge.py", "-k", "merged_is_base_plus_adapter")
    project.run("pytest", "-p", "no:cacheprovider", "tests/stages/test_train.py", "-k", "reaches_its_library")
