"""The reference recipe over HTTP: phi-2 and OASST1 from a hub on loopback, and other models and data sets of it."""

import json
import shutil

import pandas as pd
import pytest

from stages.common.artifacts import digest_files
from tests.support.hub_repositories import ALL_TREES, REFERENCE, SMALLER
from tests.support.project import STAGES, error_line, stages_run
from tests.support.rows import write_jsonl

pytestmark = pytest.mark.slow


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


def test_the_best_recipe_runs_from_the_hub(reference, hub):
    project, run = reference
    run("commands", "recipe", "phi2-oasst1-best")
    # bf16 stays as the recipe has it: a CPU computes it, too.
    project.set(**{**SMALLER, "max_steps": None, "num_train_epochs": 2.0})
    assert stages_run(run("dvc", "repro").stdout) == STAGES
    config = json.loads((project.folder / "models/adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (64, 16)
    assert config["target_modules"] == ["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"]
    training = json.loads((project.folder / "models/adapter/training.json").read_text())
    assert training["steps"] == 4  # two passes over 24 conversations, 16 a step
    losses = pd.read_csv(project.folder / "reports/loss/validation.csv", index_col="step")["loss"]
    assert losses[training["adapter_of_step"]] == losses.loc[1:].min() == training["held_out_loss_after"]


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


def test_several_data_sets_are_an_experiment_away(reference, hub, repositories):
    project, run = reference
    hub.add("datasets", "someone/trees", "2" * 40, repositories["data"])
    commits = f"['{REFERENCE.dataset_revision}','{'2' * 40}']"
    changed = [f"dataset=[{REFERENCE.dataset},someone/trees]", f"dataset_revision={commits}"]
    run("dvc", "exp", "run", "prepare", *(part for change in changed for part in ("-S", change)))
    sources = json.loads((project.folder / "data/raw/source.json").read_text())
    assert [source["source"] for source in sources] == [REFERENCE.dataset, "someone/trees"]
    assert json.loads((project.folder / "reports/funnel.json").read_text())["read"]["messages"] == 240
