"""The real pipeline by the real DVC, on a tiny model: outputs, reruns, experiments, refusals."""

import csv
import json
import re
import shutil

import pytest

from stages.common.artifacts import digest_files
from tests.support.project import ROOT

pytestmark = pytest.mark.slow


def stages_run(result) -> list[str]:
    return re.findall(r"Running stage '(\w+)'", result.stdout)


MADE = ["reports/metrics.json", "reports/samples.md", "reports/loss/train.csv", "models/adapter/training.json"]
STAGES = ["fetch", "prepare", "tokenize", "train", "merge", "evaluate", "export"]


def test_repro_experiments_and_refusals(tiny_project):
    folder = tiny_project.folder
    assert sorted(stages_run(tiny_project.run("dvc", "repro"))) == sorted(STAGES)

    # What it made, and that none of it holds a path of this machine.
    metrics = json.loads((folder / "reports/metrics.json").read_text())
    assert metrics["tuned"]["loss"] < metrics["base"]["loss"]
    curve = list(csv.DictReader((folder / "reports/loss/train.csv").open()))
    assert [row["step"] for row in curve] == ["1", "2", "3", "4"]
    assert not (folder / "models/checkpoints").exists() or not list((folder / "models/checkpoints").iterdir())
    for path in [*(folder / "reports").rglob("*"), *(folder / "models").rglob("*.json"), *folder.glob("data/*/*.json")]:
        assert not path.is_file() or str(folder) not in path.read_text(encoding="utf-8"), path
    summary = tiny_project.run("commands.summary").stdout
    assert "perplexity" in summary and "What is the capital of France?" in summary

    # Nothing changed: nothing runs, and the tree is as committed but for what DVC wrote.
    tiny_project.commit("reproduced")
    again = tiny_project.run("dvc", "repro")
    assert stages_run(again) == [] and "up to date" in again.stdout

    # An experiment reruns train and what follows, and is listed, by a user without a git identity.
    experiment = tiny_project.run("dvc", "exp", "run", "--name", "slower", "-S", "learning_rate=1e-5")
    assert sorted(stages_run(experiment)) == ["evaluate", "export", "merge", "train"]
    adapter = json.loads((folder / "models/adapter/training.json").read_text())
    assert adapter["params"]["learning_rate"] == 0.00001
    rows = list(csv.DictReader(tiny_project.run("dvc", "exp", "show", "--csv").stdout.splitlines()))
    assert "slower" in {row["Experiment"] for row in rows}
    for command in ("metrics", "params"):
        assert tiny_project.run("dvc", command, "diff").stdout.strip()
    tiny_project.run("dvc", "plots", "show")
    assert "loss" in (folder / "dvc_plots/index.html").read_text(encoding="utf-8")

    # A wrong value: one line, and nothing is lost.
    before = {path: (folder / path).read_bytes() for path in MADE}
    refused = tiny_project.run("dvc", "exp", "run", "-S", "learning_rate=-1", check=False)
    assert refused.returncode != 0
    said = [line for line in (refused.stdout + refused.stderr).splitlines() if line.startswith("error:")]
    assert said == ["error: params.yaml: learning_rate: -1: must be greater than 0"]
    assert "Traceback" not in refused.stdout + refused.stderr
    # The way back from it computes nothing anew.
    tiny_project.set(learning_rate=1e-5)
    back = tiny_project.run("dvc", "repro")
    assert stages_run(back) == []
    assert {path: (folder / path).read_bytes() for path in MADE} == before


PLACES = {
    # where it is killed, and the checkpoint from which it goes on
    "in its steps": ("trainer_callback.DefaultFlowCallback", "on_step_end", 3, 2),
    "its checkpoint half written": ("trainer.Trainer", "_save_rng_state", 4, 2),
    "its checkpoint not sealed": ("stages.common.checkpoints", "seal", 4, 2),
    "its adapter not written": ("trainer_callback.CallbackHandler", "on_train_end", 4, 4),
}


@pytest.mark.parametrize("place", [pytest.param(p, marks=[] if "half" in p else pytest.mark.long) for p in PLACES])
def test_a_killed_training_goes_on_from_its_checkpoint(tiny_project, place):
    for stage in ("fetch", "prepare", "tokenize"):
        tiny_project.run(f"stages.{stage}")
    unbroken = tiny_project.run("stages.train")
    assert "going on" not in unbroken.stdout
    adapter = digest_files([tiny_project.folder / "models/adapter"])
    curves = [(tiny_project.folder / f"reports/loss/{split}.csv").read_bytes() for split in ("train", "validation")]
    owner, function, step, checkpoint = PLACES[place]
    (tiny_project.folder / "killed.py").write_text(
        "import os, runpy, signal\n"
        "import stages.common.checkpoints\n"
        "from transformers import trainer, trainer_callback\n"
        f"owner, step = {owner}, {step}\n"
        f"real = owner.{function}\n"
        "def stop(first, *args, **kwargs):\n"
        "    states = [getattr(x, 'state', x) for x in (first, *args)]\n"
        "    steps = [s.global_step for s in states if hasattr(s, 'global_step')]\n"
        f"    if (steps or [int(str(first).rpartition('-')[2])])[0] == step:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(first, *args, **kwargs)\n"
        f"owner.{function} = stop\n"
        "runpy.run_module('stages.train', run_name='__main__')\n"
    )
    assert tiny_project.run("killed", check=False).returncode == -9
    resumed = tiny_project.run("stages.train")
    assert re.search(rf"going on from .*checkpoint-{checkpoint}\n", resumed.stdout)
    assert ("passing over" in resumed.stdout) == ("checkpoint" in place)
    again = [(tiny_project.folder / f"reports/loss/{split}.csv").read_bytes() for split in ("train", "validation")]
    assert again == curves
    assert digest_files([tiny_project.folder / "models/adapter"]) == adapter  # in every byte, also of its configuration
    assert not (tiny_project.folder / "models/checkpoints").exists()


def test_an_edited_output_and_a_lost_cache_are_made_anew(tiny_project):
    folder = tiny_project.folder
    tiny_project.run("dvc", "repro", "prepare")
    whole = digest_files([folder / "data/prepared"])
    with (folder / "data/prepared/train.parquet").open("ab") as file:
        file.write(b"x")
    assert "data/prepared" in tiny_project.run("dvc", "status").stdout
    assert stages_run(tiny_project.run("dvc", "repro", "prepare")) == []  # its cache of runs has it
    assert digest_files([folder / "data/prepared"]) == whole
    shutil.rmtree(folder / "data/prepared")
    shutil.rmtree(folder / ".dvc/cache")
    assert stages_run(tiny_project.run("dvc", "repro", "prepare"))[-1] == "prepare"
    assert digest_files([folder / "data/prepared"]) == whole


def test_queued_and_temporary_experiments_find_everything(tiny_project):
    tiny_project.run("dvc", "repro", "tokenize")
    tiny_project.commit("tokenised")
    result = tiny_project.run("dvc", "exp", "run", "--temp", "--name", "aside", "-S", "max_steps=3", "train")
    assert "train" in stages_run(result)
    assert not (tiny_project.folder / "models/adapter").exists()


def test_recipes_are_switched_without_losing_edits(project):
    params, recipes = project.folder / "params.yaml", project.folder / "recipes"
    project.run("commands.recipe", "phi2-oasst1")
    assert params.read_bytes() == (ROOT / "recipes/phi2-oasst1.yaml").read_bytes()
    assert not (recipes / "previous.yaml").exists()
    project.set(seed=7)
    edited = params.read_bytes()
    said = project.run("commands.recipe", "smollm2-cpu").stdout
    assert "make recipe NAME=previous" in said
    project.run("commands.recipe", "previous")
    assert params.read_bytes() == edited
    project.set(seed=8)
    assert "make recipe NAME=previous-2" in project.run("commands.recipe", "smollm2-cpu").stdout
    project.run("commands.recipe", "previous")
    refused = project.run("commands.recipe", "nonsense", check=False)
    assert refused.returncode == 1 and "one of: phi2-oasst1, previous, previous-2, smollm2-cpu" in refused.stderr
    assert params.read_bytes() == edited


def test_the_reference_recipe_is_refused_without_a_gpu_in_one_line(tiny_project):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for stage in ("fetch", "prepare", "tokenize"):
        tiny_project.run(f"stages.{stage}")
    tiny_project.set(fp16=True)
    refused = tiny_project.run("stages.train", check=False)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("error: fp16: true: needs a CUDA GPU")
    assert "Traceback" not in refused.stderr
