"""The reference recipe over HTTP: phi-2 and OASST1 from a hub on loopback, and what a real network does wrong."""

import gzip
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from stages.common.artifacts import digest_files
from stages.common.params import read_params
from tests.support.hub import Hub, running
from tests.support.models import save_phi
from tests.support.project import ROOT, STAGES, Project, error_line, outputs_of, stages_run
from tests.support.rows import message, write_jsonl
from tests.support.warm import WarmPython

pytestmark = pytest.mark.slow

REFERENCE = read_params(ROOT / "recipes/phi2-oasst1.yaml")
SHARD = "00000-of-00001-0123456789abcdef"
ALL_TREES = "2023-04-12_oasst_all.trees.jsonl.gz"
# All that is changed in the reference recipe for a CPU and a tiny model: steps, lengths, precision.
SMALLER = {
    "max_steps": 2,
    "save_steps": 1,
    "logging_steps": 1,
    "eval_steps": 1,
    "fp16": False,
    "eval_dtype": "float32",
    "max_length": 128,
    "max_new_tokens": 4,
    "bootstrap_samples": 100,
    "export_max_perplexity_increase": 10.0,
}


def oasst_rows(first: int, count: int) -> list[dict]:
    """`count` trees in the full flat schema of the hub: two ranked answers, a follow-up, labels and detoxify filled."""
    labels = {"name": ["spam", "quality"], "value": [0.0, 0.75], "count": [3, 3]}
    extra = {
        "user_id": "u",
        "created_date": "2023-02-05T14:23:50.983374+00:00",
        "review_count": 3,
        "model_name": None,
        "detoxify": {"toxicity": 0.001, "severe_toxicity": 0.0},
        "emojis": {"name": ["+1"], "count": [1]},
        "labels": labels,
    }
    rows = []
    for i in range(first, first + count):
        rows += [
            message(f"t{i}", role="prompter", text=f"What is {i} + 1?", **extra),
            message(f"t{i}.b", f"t{i}", text="I do not know.", rank=1, **extra),
            message(f"t{i}.a", f"t{i}", text=f"It is {i + 1}.", rank=0, **extra),
            message(f"t{i}.a.p", f"t{i}.a", role="prompter", text="Thanks!", **extra),
        ]
    return rows


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("hub")
    model = save_phi(folder / "phi-2")
    (model / "README.md").write_text("---\nlicense: mit\n---\n# A small Phi\n")
    config = json.loads((model / "config.json").read_text())
    # Offered, never taken: transformers knows this type itself.
    config["auto_map"] = {"AutoConfig": "modeling_phi.Config", "AutoModelForCausalLM": "modeling_phi.Model"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "modeling_phi.py").write_text("raise SystemExit('code of a repository was run')\n")
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    data = folder / "oasst1"
    (data / "data").mkdir(parents=True)
    (data / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Conversations\n")
    for split, first, count in (("train", 0, 24), ("validation", 24, 6)):
        frame = pd.DataFrame(oasst_rows(first, count)).astype({"rank": "Int32", "review_count": "int32"})
        frame.to_parquet(data / f"data/{split}-{SHARD}.parquet", index=False)
    with gzip.open(data / ALL_TREES, "wt", encoding="utf-8") as file:
        for row in oasst_rows(50, 20):
            if row["parent_id"] is None:
                answer = {"message_id": f"{row['message_id']}.a", "text": "Yes.", "role": "assistant", "replies": []}
                tree = {"message_tree_id": row["message_id"], "tree_state": "ready_for_export"}
                file.write(json.dumps({**tree, "prompt": {**row, "replies": [answer]}}) + "\n")
    return {"model": model, "data": data}


@pytest.fixture(scope="module")
def server():
    """A hub without repositories."""
    with running(Hub()) as served:
        yield served


@pytest.fixture
def hub(server, repositories):
    """The hub with phi-2 and OASST1, and no fault."""
    server.reset()
    server.add("models", REFERENCE.base_model, REFERENCE.base_model_revision, repositories["model"])
    server.add("datasets", REFERENCE.dataset, REFERENCE.dataset_revision, repositories["data"])
    return server


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Where the hub's libraries keep what they downloaded."""
    return tmp_path_factory.mktemp("home") / "hf"


@pytest.fixture(scope="module")
def warm_for_the_hub(tmp_path_factory, server, home) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("warm")
    warm = WarmPython(folder, {**Project(folder).environment(), **settings(server, home)})
    yield warm.python
    warm.stop()


def settings(hub: Hub, home: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}


@pytest.fixture
def reference(project, hub, home, warm_for_the_hub):
    """A project with the reference recipe, and a function that runs a module of it against the hub."""
    project.run("commands", "recipe", "phi2-oasst1")
    project.set(**SMALLER)
    project.commit("reference recipe")
    shutil.rmtree(home, ignore_errors=True)
    project.python = warm_for_the_hub

    def run(*command: str, check: bool = True, **environment: str):
        return project.run(*command, check=check, **{**settings(hub, home), **environment})

    return project, run


def test_the_reference_recipe_runs_from_the_hub(reference, hub, home):
    project, run = reference
    assert stages_run(run("dvc", "repro").stdout) == STAGES
    base = {path.name for path in (project.folder / "models/base").iterdir()}
    assert "model.safetensors" in base and not base & {"modeling_phi.py", "pytorch_model.bin"}
    funnel = json.loads((project.folder / "reports/funnel.json").read_text())
    assert funnel["read"]["messages"] == 120
    assert funnel["kept"]["train"]["conversations"] == 24 and funnel["kept"]["validation"]["conversations"] == 6
    card = (project.folder / "models/merged/README.md").read_text()
    for fact in ("license: mit", REFERENCE.base_model_revision, REFERENCE.dataset_revision, "licence apache-2.0"):
        assert fact in card
    # Fetched again, offline: everything comes from the cache, the same bytes.
    before, fetched = len(hub.requests), [project.folder / "models/base", project.folder / "data/raw"]
    bytes_before = digest_files(fetched)
    shutil.rmtree(fetched[0])
    for stage in ("fetch", "fetch_model"):
        run("dvc", "repro", "--force", "--single-item", stage, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == before
    assert digest_files(fetched) == bytes_before
    assert not (home / "token").exists()


def test_the_hubs_splits_its_export_and_a_file_of_ones_own_are_mixed_by_weights(reference, hub):
    project, run = reference
    turns = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Your assistant."}]
    write_jsonl(project.folder / "data/local/mine.jsonl", [{"messages": turns}])
    project.set(
        dataset=[REFERENCE.dataset, f"{REFERENCE.dataset}/{ALL_TREES}", "file:data/local/mine.jsonl"],
        dataset_revision=[REFERENCE.dataset_revision, REFERENCE.dataset_revision, None],
        dataset_weights=[0.5, 1.0, 3.0],
        validation_fraction=0.1,
    )
    result = run("dvc", "repro", "prepare")
    kept = json.loads((project.folder / "reports/funnel.json").read_text())["kept"]
    train, validation = (kept[split]["by_dataset"] for split in ("train", "validation"))
    assert (train["1"], validation["1"]) == (12, 6)  # half of 24; the hub's own validation split
    assert train["2"] + validation["2"] == 20
    # Its one conversation fell to the one side or the other, by its hash; on the training side it counts three times.
    assert (train.get("3", 0), validation.get("3", 0)) == (3, 0)
    # The two known data sets are not the real ones here, and both are said to be.
    assert "has 88838 messages in 10364 trees, but 120 in 30" in result.stderr
    assert "has 161443 messages in 66497 trees, but 40 in 20" in result.stderr
    sources = json.loads((project.folder / "data/raw/source.json").read_text())
    assert [source["license"] for source in sources] == ["apache-2.0", None, None]


def test_another_model_and_data_set_of_the_hub_are_an_experiment_away(reference, hub, tiny_llama, repositories):
    project, run = reference
    hub.add("models", "someone/llama", "1" * 40, tiny_llama)
    hub.add("datasets", "someone/trees", "2" * 40, repositories["data"])
    changed = ["base_model=someone/llama", f"base_model_revision='{'1' * 40}'", "chat_template=chatml"]
    changed += ["dataset=someone/trees", f"dataset_revision='{'2' * 40}'", "max_steps=1"]
    options = [part for change in changed for part in ("-S", change)]
    said = error_line(run("dvc", "exp", "run", "train", *options, check=False))
    assert (
        "the base model has no dense. Choose from q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."
        in said
    )
    run("dvc", "exp", "run", "train", "-S", "target_modules=[q_proj,up_proj]")
    config = json.loads((project.folder / "models/adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "up_proj"]


def test_a_plan_downloads_the_configuration_alone(reference, hub):
    project, run = reference
    hub.add("models", "someone/phi", "3" * 40, hub.repositories["models", REFERENCE.base_model][1])
    project.set(base_model="someone/phi", base_model_revision="3" * 40)
    said = run("commands", "plan").stdout
    assert "on OpenAssistant/oasst1 (configuration from the hub (config.json alone))" in said
    assert {request.rpartition("/")[2] for request in hub.requests} == {"config.json"}
    del hub.repositories["models", "someone/phi"]
    project.set(base_model_revision="4" * 40)
    failed = run("commands", "plan", check=False)
    assert failed.returncode == 1 and failed.stderr.startswith("error: someone/phi at 4444")


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


def test_several_data_sets_are_an_experiment_away(reference, hub, repositories):
    project, run = reference
    hub.add("datasets", "someone/trees", "2" * 40, repositories["data"])
    commits = f"['{REFERENCE.dataset_revision}','{'2' * 40}']"
    changed = [f"dataset=[{REFERENCE.dataset},someone/trees]", f"dataset_revision={commits}"]
    run("dvc", "exp", "run", "prepare", *(part for change in changed for part in ("-S", change)))
    sources = json.loads((project.folder / "data/raw/source.json").read_text())
    assert [source["source"] for source in sources] == [REFERENCE.dataset, "someone/trees"]
    assert json.loads((project.folder / "reports/funnel.json").read_text())["read"]["messages"] == 240


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
