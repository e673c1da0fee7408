"""`make verify` names the first output that differs, and can tell another machine from another run."""

import json
import math
import shutil
import subprocess
from hashlib import md5

import pandas as pd
import pytest
from ruamel.yaml import YAML

from commands.lockfile import parameters, read_lock
from commands.verify import check_repository, first_difference, recorded_run, verdict
from stages.common.errors import StageError


def made(folder, *, data="d", weights="w", loss=2.0, steps=(1, 2), tuned=None):
    """A folder as a finished run leaves it: dvc.lock, one data file, one model, a curve and the figures."""
    for name, text in (
        ("data/raw/rows.jsonl", data),
        ("models/adapter/a.bin", "same"),
        ("models/adapter/w.bin", weights),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "reports/loss").mkdir(parents=True)
    for split in ("train", "validation"):
        curve = pd.DataFrame({"step": steps, "loss": [loss + 1, loss]})
        curve.to_csv(folder / f"reports/loss/{split}.csv", index=False)
    figures = {"ratio": 0.5, "ppl": math.exp(loss if tuned is None else tuned)}
    (folder / "reports/metrics.json").write_text(json.dumps(figures))

    def digest(text: str) -> str:
        return md5(text.encode()).hexdigest()

    stages = {
        # dvc.lock need not hold the stages in their order.
        "train": {
            "deps": [{"path": "data/raw", "md5": digest(data)}, {"path": "stages/train.py", "md5": "c"}],
            "params": {"params.yaml": {"seed": 42}},
            "outs": [{"path": "models/adapter", "md5": digest(weights)}],
        },
        "fetch": {"outs": [{"path": "data/raw", "md5": digest(data)}]},
    }
    YAML().dump({"schema": "2.0", "stages": stages}, folder / "dvc.lock")
    YAML().dump({"stages": {"fetch": {}, "train": {}}}, folder / "dvc.yaml")
    return folder


def test_the_first_output_that_differs_is_named_with_its_file(tmp_path):
    one = made(tmp_path / "one")
    assert first_difference(one, made(tmp_path / "same")) is None
    assert first_difference(one, made(tmp_path / "weights", weights="other")) == "models/adapter/w.bin"
    assert first_difference(one, made(tmp_path / "both", data="other", weights="other")) == "data/raw/rows.jsonl"


def test_the_lock_file_is_read_in_the_order_of_the_pipeline(tmp_path):
    stages = read_lock(made(tmp_path / "one"))
    assert list(stages) == ["fetch", "train"]
    assert parameters(stages) == {"seed": 42}
    assert parameters(read_lock(tmp_path)) == {}  # no file


def test_another_machine_is_no_other_run(tmp_path):
    one = made(tmp_path / "one")
    assert "has the same bits" in verdict(one, made(tmp_path / "same"))
    near = verdict(one, made(tmp_path / "near", weights="other", loss=2.0005))
    assert "as runs on another kind of machine have" in near and "largest difference 0.000500" in near
    with pytest.raises(
        StageError, match="differs by 0.0020 nats a token .* first output that differs is models/adapter"
    ):
        verdict(one, made(tmp_path / "far", weights="other", loss=2.002))
    with pytest.raises(StageError, match="differs by 0.0020 nats"):  # the curves are the same
        verdict(one, made(tmp_path / "figures", weights="other", tuned=2.002))
    with pytest.raises(StageError, match="differs by 0.0020 nats"):  # the final figures are the same
        verdict(one, made(tmp_path / "curve", weights="other", loss=2.002, tuned=2.0))
    with pytest.raises(StageError, match="differs by inf"):
        verdict(one, made(tmp_path / "steps", weights="other", steps=(1, 3)))
    with pytest.raises(StageError, match="data/raw differs .* before training nothing depends on the machine"):
        verdict(one, made(tmp_path / "data", data="other", weights="other"))
    bare = made(tmp_path / "bare", weights="other")
    shutil.rmtree(bare / "reports")
    with pytest.raises(StageError, match="no losses to compare with"):
        verdict(bare, one)
    other = made(tmp_path / "params", weights="other", loss=9)
    lock = (other / "dvc.lock").read_text()
    (other / "dvc.lock").write_text(lock.replace("seed: 42", "seed: 7"))
    assert "with other parameters" in verdict(one, other)
    (tmp_path / "one/dvc.lock").unlink()
    assert "no recorded run" in verdict(one, made(tmp_path / "again"))


def test_what_counts_is_what_git_has_recorded(tmp_path):
    """Not what was run since: otherwise a run would be compared with itself."""
    project = made(tmp_path / "project")
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "recorded"]):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *command], cwd=project, check=True)
    shutil.rmtree(project / "reports")
    made(project, weights="other", loss=9)
    recorded = recorded_run(project, tmp_path / "recorded")
    assert "has the same bits" in verdict(recorded, made(tmp_path / "found"))
    with pytest.raises(StageError, match="more than 0.001"):
        verdict(recorded, project)
    (project / "dvc.lock").write_text("stages: [")
    with pytest.raises(StageError, match="dvc.lock is damaged"):
        read_lock(project)


def test_a_folder_without_git_or_without_a_commit_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("GIT_DIR", raising=False)
    with pytest.raises(StageError, match="no git repository with a commit.* run `git init`"):
        check_repository(tmp_path)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    with pytest.raises(StageError, match="no git repository with a commit"):
        check_repository(tmp_path)
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run(["git", *identity, "commit", "--quiet", "--allow-empty", "--message", "x"], cwd=tmp_path, check=True)
    check_repository(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StageError, match="git is not installed"):
        check_repository(tmp_path)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_two_runs_from_nothing_give_the_same_bits(cold_project):
    before = (cold_project.folder / "dvc.lock").read_bytes()
    said = cold_project.run("commands", "verify").stdout
    assert "two runs from nothing gave the same" in said and "outputs, bit for bit" in said
    assert "The run in dvc.lock has the same bits, too" in said
    assert (cold_project.folder / "dvc.lock").read_bytes() == before


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_stage_that_is_not_repeatable_is_found(tiny_project):
    stage = tiny_project.folder / "stages/prepare.py"
    code = stage.read_text(encoding="utf-8")
    changed = code.replace(
        'write_json(folder / "params.json", params.model_dump())',
        'write_json(folder / "params.json", str(folder.resolve()))',
    )
    assert changed != code
    stage.write_text(changed, encoding="utf-8")
    result = tiny_project.run("commands", "verify", "prepare", check=False)
    assert result.returncode == 1
    assert "error: data/prepared/params.json differs between two runs from nothing" in result.stderr
