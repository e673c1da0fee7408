"""What a real network and a hub do wrong: fetch tries again or stops in one line; nothing is half-written."""

import re
import shutil

import pandas as pd
import pytest

from tests.support.hub_repositories import REFERENCE, SHARD
from tests.support.project import error_line, outputs_of

pytestmark = pytest.mark.slow


def failed_fetch(reference, stage: str, **environment: str) -> str:
    """The one line that a failing stage ends with; asserts that it left nothing."""
    project, run = reference
    result = run("stages", stage, check=False, **environment)
    assert result.returncode == 1
    line = error_line(result)
    assert not [path for path in outputs_of(stage) if (project.folder / path).exists()]
    assert not list(project.folder.glob("data/.*.partial")) + list(project.folder.glob("models/.*.partial"))
    assert line == result.stderr.splitlines()[-1]
    return line


def test_a_repository_that_is_not_there(reference, hub):
    del hub.repositories["models", REFERENCE.base_model]
    assert re.search("microsoft/phi-2 .*: no such repository, or a private one", failed_fetch(reference, "fetch_model"))


def test_a_dataset_that_is_not_there(reference, hub):
    del hub.repositories["datasets", REFERENCE.dataset]
    assert re.search(
        "OpenAssistant/oasst1 .*: no such (repository|data set), or a private one", failed_fetch(reference, "fetch")
    )


def test_a_gated_model_says_how_to_get_in_and_shows_no_token(reference, hub):
    hub.gated.add(REFERENCE.base_model)
    said = failed_fetch(reference, "fetch_model", HF_TOKEN="hf_secret")
    assert "is gated" in said and "hf auth login" in said
    assert "hf_secret" not in said


@pytest.mark.parametrize("which, stage", [("base_model", "fetch_model"), ("dataset", "fetch")])
def test_a_private_repository_is_one_line_and_shows_no_token(which, stage, reference, hub):
    hub.private.add(getattr(REFERENCE, which))
    said = failed_fetch(reference, stage, HF_TOKEN="hf_of_somebody_else")
    assert re.search("no such (repository|data set), or a private one", said) and "hf auth login" in said
    assert "hf_of" not in said


def test_a_wrong_revision(reference, hub):
    project, _ = reference
    project.set(base_model_revision="0" * 40)
    assert "has no such commit" in failed_fetch(reference, "fetch_model")


def test_a_busy_hub_and_a_cut_connection_are_tried_again(reference, hub, repositories):
    project, run = reference
    hub.faults.update({"503": 1, "cut": 1})
    run("stages", "fetch_model")
    assert not +hub.faults
    fetched = project.folder / "models/base"
    assert (fetched / "model.safetensors").read_bytes() == (repositories["model"] / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "README.md", f"train-{SHARD}.parquet"],
)
def test_a_hub_that_is_busy_for_any_one_file_is_asked_again(name, reference, hub):
    project, run = reference
    hub.busy[name] = 2
    said = "".join(run("stages", stage).stdout for stage in ("fetch", "fetch_model"))
    assert "trying again" in said and not +hub.busy
    assert len(pd.read_parquet(project.folder / "data/raw/1/train.parquet")) == 96


def test_another_commit_in_the_cache_is_not_taken_for_the_pinned_one(reference, hub, repositories, tmp_path):
    """Offline, or where the hub stays busy, `datasets` would take the latest that it has."""
    project, run = reference
    run("stages", "fetch")
    later = shutil.copytree(repositories["data"], tmp_path / "later")
    rows = pd.read_parquet(later / f"data/train-{SHARD}.parquet")
    rows.head(40).to_parquet(later / f"data/train-{SHARD}.parquet", index=False)
    hub.add("datasets", REFERENCE.dataset, "7" * 40, later)
    project.set(dataset_revision="7" * 40)
    shutil.rmtree(project.folder / "data/raw")
    assert "could not be downloaded" in failed_fetch(reference, "fetch", HF_HUB_OFFLINE="1")
    hub.faults["503"] = 10_000
    assert "could not be downloaded" in failed_fetch(reference, "fetch")
    hub.faults.clear()
    run("stages", "fetch")
    assert len(pd.read_parquet(project.folder / "data/raw/1/train.parquet")) == 40
    project.set(dataset_revision="8" * 40)
    shutil.rmtree(project.folder / "data/raw")
    assert re.search("no such commit|Check name and commit", failed_fetch(reference, "fetch"))


def test_a_plan_leaves_nothing_that_passes_for_a_model(reference, hub):
    project, run = reference
    hub.add("models", "someone/phi", "3" * 40, hub.repositories["models", REFERENCE.base_model][1])
    project.set(base_model="someone/phi", base_model_revision="3" * 40)
    run("commands", "plan")
    assert "could not be downloaded" in failed_fetch(reference, "fetch_model", HF_HUB_OFFLINE="1")


def test_a_damaged_download_is_refused_and_fetched_again(reference, hub):
    project, run = reference
    hub.faults["damaged"] = 1
    assert "does not have the hub's hash" in failed_fetch(reference, "fetch_model")
    run("stages", "fetch_model")
    assert (project.folder / "models/base/model.safetensors").is_file()


def test_a_token_is_sent_to_the_hub_and_written_nowhere(reference, hub, home):
    project, run = reference
    result = run("dvc", "repro", "fetch", "fetch_model", HF_TOKEN="hf_secret_of_the_test")
    assert "Bearer hf_secret_of_the_test" in hub.authorizations
    assert "hf_secret" not in result.stdout + result.stderr
    for path in [*project.folder.rglob("*"), *home.rglob("*")]:
        if path.is_file():
            assert b"hf_secret" not in path.read_bytes(), path


def test_a_connection_that_is_cut_again_and_again_is_one_line(reference, hub):
    hub.faults["cut"] = 10_000
    assert "could not be downloaded" in failed_fetch(reference, "fetch_model")


# Long: the same line as in test_another_commit_in_the_cache, after as many attempts.
@pytest.mark.long
def test_a_hub_that_stays_away_is_one_line(reference, hub):
    hub.faults["503"] = 10_000
    assert "could not be downloaded" in failed_fetch(reference, "fetch")


# Long: the same line as in test_a_plan_leaves_nothing.
@pytest.mark.long
def test_offline_without_a_cache_is_one_line(reference):
    assert "could not be downloaded" in failed_fetch(reference, "fetch_model", HF_HUB_OFFLINE="1")
