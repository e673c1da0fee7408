"""The real pipeline by the real DVC, on a tiny model: outputs, reruns, killed trainings."""

import csv
import json
import re

import pytest

from commands.lockfile import read_lock
from stages import evaluate, export
from stages.common.artifacts import digest_files
from tests.support.project import STAGES, stages_run
from tests.support.rows import small_trees, write_jsonl

pytestmark = pytest.mark.slow

CURVES = [f"reports/loss/{split}.csv" for split in ("train", "validation")]


def test_every_stage_ran_once_in_order(finished):
    assert list(finished.seconds) == STAGES


def test_the_metrics_are_a_few_numbers_taken_from_the_figures(finished):
    reports = finished.folder / "reports"
    metrics, figures, cpu, exported = (
        json.loads((reports / f"{name}.json").read_text()) for name in ("metrics", "evaluation", "export", "exported")
    )
    assert metrics == evaluate.headline(figures)
    assert cpu == export.headline(exported["tuned"])
    assert figures["tuned"]["loss"] < figures["base"]["loss"] and metrics["ratio"] < 1
    assert metrics["lo"] <= metrics["ratio"] <= metrics["hi"] < 1


def test_the_curve_has_a_point_a_step_and_no_checkpoint_is_left(finished):
    curve = list(csv.DictReader((finished.folder / "reports/loss/train.csv").open()))
    assert [row["step"] for row in curve] == ["1", "2", "3", "4"]
    checkpoints = finished.folder / "models/checkpoints"
    assert not checkpoints.exists() or not list(checkpoints.iterdir())


def test_no_output_holds_a_path_of_this_machine(finished):
    folder = finished.folder
    for path in [*(folder / "reports").rglob("*"), *(folder / "models").rglob("*.json"), *folder.glob("data/*/*.json")]:
        assert not path.is_file() or str(folder) not in path.read_text(encoding="utf-8"), path


def test_nothing_runs_where_nothing_changed(finished_project):
    again = finished_project.run("dvc", "repro")
    assert stages_run(again.stdout) == [] and "up to date" in again.stdout
    assert finished_project.git("status", "--porcelain") == ""


def test_a_new_data_file_costs_no_model(finished_project):
    folder = finished_project.folder
    before = read_lock(folder)
    write_jsonl(folder / "data/local/another.jsonl", small_trees(2))
    assert stages_run(finished_project.run("dvc", "repro").stdout) == ["fetch"]
    after = read_lock(folder)
    assert [name for name in after if after[name] != before[name]] == ["fetch"]
    assert finished_project.git("status", "--porcelain") == " M dvc.lock\n"  # the file is private


PLACES = {
    # where it is killed, and the checkpoint from which it resumes
    "in its steps": ("trainer_callback.DefaultFlowCallback", "on_step_end", 3, 2),
    "its checkpoint half written": ("trainer.Trainer", "_save_rng_state", 4, 2),
    "its checkpoint not sealed": ("stages.common.trainer", "seal", 4, 2),
    "its adapter not written": ("trainer_callback.CallbackHandler", "on_train_end", 4, 4),
}


# The other places are long: the same resume, from the same or a later step.
@pytest.mark.parametrize("place", [pytest.param(p, marks=[] if "half" in p else pytest.mark.long) for p in PLACES])
def test_a_killed_training_goes_on_from_its_checkpoint(finished, finished_project, place):
    folder = finished_project.folder
    finished_project.remove("models/adapter", "reports/loss")
    owner, function, step, checkpoint = PLACES[place]
    (folder / "killed.py").write_text(
        "import os, runpy, signal, sys\n"
        "from stages.common.entry import set_environment\n"
        "set_environment(network=False)\n"
        "import stages.common.trainer\n"
        "from transformers import trainer, trainer_callback\n"
        f"owner, step = {owner}, {step}\n"
        f"real = owner.{function}\n"
        "def stop(first, *args, **kwargs):\n"
        "    states = [getattr(x, 'state', x) for x in (first, *args)]\n"
        "    steps = [s.global_step for s in states if hasattr(s, 'global_step')]\n"
        "    if (steps or [int(str(first).rpartition('-')[2])])[0] == step:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(first, *args, **kwargs)\n"
        f"owner.{function} = stop\n"
        "sys.argv = ['stages', 'train']\n"
        "runpy.run_module('stages', run_name='__main__')\n"
    )
    assert finished_project.run("killed", check=False).returncode == -9
    resumed = finished_project.run("stages", "train")
    assert re.search(rf"resuming from .*checkpoint-{checkpoint}\n", resumed.stdout)
    assert ("skipping" in resumed.stdout) == ("checkpoint" in place)
    # The same as the unbroken run's in every byte, also of its configuration.
    made = ["models/adapter", *CURVES]
    assert digest_files([folder / name for name in made]) == digest_files([finished.folder / name for name in made])
    assert not (folder / "models/checkpoints").exists()


def test_an_edited_output_and_a_lost_cache_are_made_again(finished_project):
    folder = finished_project.folder
    complete = digest_files([folder / "data/prepared"])
    with (folder / "data/prepared/train.parquet").open("ab") as file:
        file.write(b"x")
    assert "data/prepared" in finished_project.run("dvc", "status").stdout
    assert stages_run(finished_project.run("dvc", "repro", "prepare").stdout) == []  # its cache of runs has it
    assert digest_files([folder / "data/prepared"]) == complete
    finished_project.remove("data/prepared", ".dvc/cache")
    assert stages_run(finished_project.run("dvc", "repro", "prepare").stdout)[-1] == "prepare"
    assert digest_files([folder / "data/prepared"]) == complete
