"""The walk-throughs of docs/contributing.md: what they change is enough, in a copy of the project."""

import functools
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest

from stages.common.artifacts import read_json
from tests.support.project import ROOT, Project, error_line, stages_run
from tests.support.rows import message, small_trees, write_jsonl
from tests.support.walkthroughs import apply, walkthrough

FILTER, FORM, SOURCE, STAGE = "Add a filter", "Add a form of data", "Add a source", "Add a stage"
METRIC, VARIANT = "Add a metric", "Add a LoRA variant"
ALSO = ("docs", "tests", "bench", "requirements.txt")  # what a project's copy for a pipeline lacks


def changed(project: Project, heading: str) -> Project:
    for name in ALSO:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, project.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, project.folder / name)
    apply(walkthrough(heading), project.folder)
    project.run("commands", "docs")
    project.run("commands", "docs", "--check")
    project.run("ruff", "check", "--no-cache")
    project.run("ruff", "format", "--check", "--no-cache")
    return project


@pytest.mark.parametrize("heading", [FILTER, FORM, SOURCE, STAGE, METRIC, VARIANT])
def test_a_walk_through_fits_its_table_and_the_code(heading, tmp_path):
    changes = walkthrough(heading)
    section = (
        (ROOT / "docs/contributing.md").read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    )
    table = "".join(line for line in section.splitlines() if line.startswith("|"))
    assert all(f"`{name}`" in table for name in changes)
    for name in changes:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copyfile(ROOT / name, tmp_path / name)
    apply(changes, tmp_path)
    assert all((tmp_path / name).read_text(encoding="utf-8") for name in changes)


@pytest.mark.slow
@pytest.mark.long
def test_a_new_filter_filters(tiny_project):
    project = changed(tiny_project, FILTER)
    assert "min_characters" in (project.folder / "docs/parameters.md").read_text(encoding="utf-8")
    rows = [message("s", role="prompter", text="Short?"), message("s.a", "s", text="Yes.")]
    write_jsonl(project.folder / "data/local/trees.jsonl", [*small_trees(40), *rows])
    project.run("dvc", "repro", "prepare")

    def dropped() -> dict:
        return read_json(project.folder / "reports/funnel.json")["dropped"]

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
    read = read_json(project.folder / "reports/funnel.json")["read"]
    assert read["messages"] == 16 and read["trees"] == 8
    kept = [pd.read_parquet(project.folder / f"data/prepared/{split}.parquet") for split in ("train", "validation")]
    found = [[dict(turn) for turn in messages[-2:]] for messages in pd.concat(kept)["messages"]]
    assert sorted(found, key=str) == sorted(turns, key=str)
    project.run("pytest", "-p", "no:cacheprovider", "tests/stages/test_forms.py")


@pytest.mark.slow
@pytest.mark.long
def test_a_new_source_is_fetched_and_pinned(tiny_project):
    project = changed(tiny_project, SOURCE)
    rows = write_jsonl(project.folder.parent / "web/trees.jsonl", small_trees(40))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=rows.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{rows.name}"
        project.set(dataset=address, dataset_revision="sha256:" + "0" * 64)
        line = error_line(project.run("dvc", "repro", "fetch", check=False))
        project.set(dataset_revision=line.rpartition(" ")[2])
        project.run("dvc", "repro", "fetch")
        server.shutdown()
    (fetched,) = (project.folder / "data/raw").rglob(rows.name)
    assert fetched.read_bytes() == rows.read_bytes()
    tests = ["tests/stages/test_fetch.py", "tests/commands/test_troubleshooting.py", "tests/whole/test_structure.py"]
    project.run("pytest", "-p", "no:cacheprovider", "-m", "not slow", *tests)


@pytest.mark.slow
@pytest.mark.long
def test_a_new_stage_runs_after_the_others(finished_project):
    project = changed(finished_project, STAGE)
    assert stages_run(project.run("dvc", "repro").stdout) == ["judge"]
    samples = read_json(project.folder / "reports/samples.json")
    judged = read_json(project.folder / "reports/judged.json")
    assert set(judged) == {"base", "tuned"} and all(0 <= count <= len(samples) for count in judged.values())
    said = project.run("dvc", "exp", "run", "-S", "judge_max_words=1").stdout
    assert stages_run(said) == ["judge"]
    tests = ["tests/stages/test_judge.py", "tests/stages/test_params.py", "tests/whole/test_structure.py"]
    project.run("pytest", "-p", "no:cacheprovider", "-m", "not slow", *tests)


@pytest.mark.slow
@pytest.mark.long
def test_a_new_metric_is_in_the_report(finished_project):
    project = changed(finished_project, METRIC)
    assert stages_run(project.run("dvc", "repro", "evaluate").stdout) == ["evaluate"]
    answers = read_json(project.folder / "reports/evaluation.json")["answers"]
    assert all(0 <= answers[name]["empty"] <= 1 for name in ("references", "base", "tuned"))
    project.run("pytest", "-p", "no:cacheprovider", "tests/stages/test_answers.py")


@pytest.mark.slow
@pytest.mark.long
def test_a_new_lora_variant_is_trained_merged_and_planned(tiny_project):
    project = changed(tiny_project, VARIANT)
    project.run("dvc", "repro", "fetch")
    line = {}
    for excluded in (None, r".*\.layers\.0\..*"):
        project.set(exclude_modules=excluded)
        said = project.run("commands", "plan", "--no-probe").stdout
        (line[excluded],) = [part for part in said.splitlines() if part.startswith("  weights ")]
    every, half = (int(text.split("base, ")[1].split(" ")[0].replace(",", "")) for text in line.values())
    assert half == every / 2  # one of two layers
    project.run("pytest", "-p", "no:cacheprovider", "tests/stages/test_merge.py", "-k", "merged_is_base_plus_adapter")
    project.run("pytest", "-p", "no:cacheprovider", "tests/stages/test_train.py", "-k", "reaches_its_library")
