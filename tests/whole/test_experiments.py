"""Experiments by the real DVC, on a tiny model: what they run and refuse, and what DVC shows of them in 120 columns."""

import csv
import json
import re

import pytest
from ruamel.yaml import YAML

from stages.common.artifacts import digest_files
from tests.support.project import PIPELINE, RECIPE, STAGES, Project, error_line, outputs_of, stages_run, wait_for
from tests.support.rows import message, small_trees, write_jsonl

pytestmark = pytest.mark.slow

COLUMNS = 120
METRICS = ("reports/metrics.json", "reports/export.json")


@pytest.fixture(scope="module")
def experiment(finished, tmp_path_factory) -> Project:
    """The finished project after an experiment with another learning rate. No test may change it."""
    project = finished.copy(tmp_path_factory.mktemp("experiment") / "a project")
    said = project.run("dvc", "exp", "run", "-S", "learning_rate=1e-5").stdout
    assert stages_run(said) == ["train", "merge", "evaluate", "export", "gguf"]
    return project


@pytest.fixture
def after_experiment(experiment, tmp_path) -> Project:
    """A copy of it, for a test that changes it."""
    return experiment.copy(tmp_path / "a project")


def metric_names(project: Project) -> list[str]:
    return [name for path in METRICS for name in json.loads((project.folder / path).read_text())]


def shown(project: Project, *command: str) -> list[str]:
    """The lines that DVC prints on a terminal of COLUMNS columns."""
    return project.run("dvc", *command, COLUMNS=str(COLUMNS)).stdout.splitlines()


def test_an_experiment_trains_with_its_parameters_and_is_listed(experiment):
    training = json.loads((experiment.folder / "models/adapter/training.json").read_text())
    assert training["params"]["learning_rate"] == 0.00001
    rows = list(csv.DictReader(experiment.run("dvc", "exp", "show", "--csv").stdout.splitlines()))
    assert {row["learning_rate"] for row in rows if row["rev"]} == {"0.01", "1e-05"}
    assert "learning_rate" in experiment.run("dvc", "params", "diff").stdout


def test_the_loss_curve_is_plotted(after_experiment):
    after_experiment.run("dvc", "plots", "show")
    assert "loss" in (after_experiment.folder / "dvc_plots/index.html").read_text(encoding="utf-8")


def test_metrics_are_the_numbers_that_one_compares(experiment):
    assert 8 <= len(metric_names(experiment)) <= 12
    declared = [path for stage in PIPELINE.values() for entry in stage.get("metrics", []) for path in entry]
    assert declared == list(METRICS)


def check_width(project: Project) -> None:
    names = metric_names(project)
    for command in ("show", "diff"):
        lines = shown(project, "metrics", command)
        assert max(len(line) for line in lines) <= COLUMNS, "\n".join(lines)
    header = next(line for line in shown(project, "exp", "show") if "Experiment" in line)[:COLUMNS]
    assert re.findall(r"\S+", header)[: len(names) + 2] == ["Experiment", "Created", *names]


def test_metrics_are_read_in_120_columns(experiment):
    check_width(experiment)
    (line,) = [line for line in shown(experiment, "exp", "show") if "└──" in line]
    values = json.loads((experiment.folder / "reports/metrics.json").read_text())
    assert f"{values['ppl']:.2f}".rstrip("0") in line[:COLUMNS]


def test_metrics_are_read_in_120_columns_after_a_change_of_data(after_experiment):
    trees = small_trees(60)
    for row in trees[::3]:
        row["lang"] = "de"
    write_jsonl(after_experiment.folder / "data/local/trees.jsonl", trees)
    after_experiment.set(languages=[])
    said = after_experiment.run("dvc", "repro", "evaluate").stdout
    assert stages_run(said) == [stage for stage in STAGES if stage not in ("fetch_model", "export", "gguf")]
    check_width(after_experiment)


def test_an_experiment_changes_one_line_of_the_parameters(experiment, finished):
    """Comments stay, and so do line breaks: DVC reads and writes all of params.yaml."""
    before = (finished.folder / "params.yaml").read_text(encoding="utf-8")
    after = (experiment.folder / "params.yaml").read_text(encoding="utf-8")
    assert re.sub("^learning_rate: .*", "learning_rate: 1e-05", before, flags=re.MULTILINE) == after
    assert after.count("#") == RECIPE.read_text(encoding="utf-8").count("#") > 60


def test_a_wrong_value_is_one_line_and_the_way_back_computes_nothing(after_experiment):
    folder = after_experiment.folder
    made = [folder / path for stage in STAGES for path in outputs_of(stage)]
    before = digest_files(made)
    refused = after_experiment.run("dvc", "exp", "run", "-S", "learning_rate=-1", check=False)
    assert error_line(refused) == "error: params.yaml: learning_rate: -1: must be greater than 0"
    after_experiment.set(learning_rate=1e-5)
    assert stages_run(after_experiment.run("dvc", "repro").stdout) == []
    assert digest_files(made) == before


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"export_block_size": 7}, "error: params.yaml: export_block_size: 7: must be 16, 32, 64 or 128"),
        ({"chat_template": "nope"}, "error: params.yaml: chat_template: 'nope': stages/templates/nope.jinja does not"),
    ],
)
def test_a_wrong_value_of_a_later_stage_is_refused_first(changes, said, finished_project):
    """By what `make all` runs, before DVC removes an output; by `dvc repro` in the first stage that runs."""
    folder = finished_project.folder
    write_jsonl(folder / "data/local/trees.jsonl", small_trees(41))
    finished_project.set(**changes)
    before = digest_files([folder / name for name in ("data", "models", "reports", "dvc.lock")])
    assert error_line(finished_project.run("commands", "repro", check=False)).startswith(said)
    assert digest_files([folder / name for name in ("data", "models", "reports", "dvc.lock")]) == before
    refused = finished_project.run("dvc", "repro", check=False)
    assert error_line(refused).startswith(said) and stages_run(refused.stdout) == ["fetch"]


# Experiments in a folder of their own ------------------------------------------------------------------------------

ASIDE = ("dvc", "exp", "run", "--temp", "--name", "aside")


def track(project: Project) -> Project:
    """Have git track the data and the model, which it would ignore."""
    project.git("add", "--force", "data/local", "models/local")
    project.commit("data and model")
    return project


def rows_read(project: Project, experiment: str) -> int:
    """The messages that an experiment's data set has, from the record of it that git and DVC keep."""
    ref = next(ref for ref in project.git("for-each-ref", "--format=%(refname)").split() if ref.endswith(experiment))
    lock = YAML(typ="safe").load(project.git("show", f"{ref}:dvc.lock"))
    (md5,) = [out["md5"] for out in lock["stages"]["prepare"]["outs"] if out["path"] == "reports/funnel.json"]
    return json.loads((project.folder / f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}").read_text())["read"]["messages"]


def test_a_temporary_experiment_finds_everything_and_leaves_the_project_alone(finished_project):
    track(finished_project)
    before = digest_files([finished_project.folder / "models"])
    result = finished_project.run(*ASIDE, "-S", "max_steps=3", "train")
    assert stages_run(result.stdout) == ["train"]
    assert digest_files([finished_project.folder / "models"]) == before


def test_private_data_are_refused_in_a_folder_of_their_own_until_dvc_has_them(finished_project):
    folder = finished_project.folder
    assert finished_project.git("status", "--porcelain", "data", "models") == ""  # git ignores them
    refused = error_line(finished_project.run(*ASIDE, "prepare", check=False))
    assert refused == (
        "error: data/local/trees.jsonl is not in this experiment's folder: with --temp and --queue, DVC copies only "
        "tracked files. Run `dvc add data/local/trees.jsonl` and `git add data/local/trees.jsonl.dvc`, or `git add "
        "--force data/local/trees.jsonl`, then the experiment again."
    )
    finished_project.run("dvc", "add", "data/local/trees.jsonl", "models/local/tiny")
    refused = error_line(finished_project.run(*ASIDE, "prepare", check=False))
    assert "Run `git add data/local/trees.jsonl.dvc`, then" in refused
    finished_project.git("add", "data", "models")
    # What stands there now, not what was added: by --temp, and by --queue even after another change.
    write_jsonl(folder / "data/local/trees.jsonl", small_trees(42))
    assert stages_run(finished_project.run(*ASIDE, "prepare").stdout) == ["fetch", "prepare"]
    assert rows_read(finished_project, "aside") == 84
    write_jsonl(folder / "data/local/trees.jsonl", small_trees(43))
    finished_project.run("dvc", "exp", "run", "--queue", "--name", "queued", "prepare")
    write_jsonl(folder / "data/local/trees.jsonl", small_trees(44))
    finished_project.run("dvc", "queue", "start")
    wait_for(lambda: not re.search("Running|Queued", finished_project.run("dvc", "queue", "status").stdout))
    assert rows_read(finished_project, "queued") == 86


def test_a_folder_of_which_git_tracks_a_part_is_refused_by_whichever_stage_runs_first(finished_project):
    """The data are up to date by DVC's records: without a check the training would go on with a part of them."""
    folder = finished_project.folder
    write_jsonl(folder / "data/local/mine/a.jsonl", small_trees(40))
    finished_project.set(dataset="file:data/local/mine")
    track(finished_project)
    finished_project.run("dvc", "repro", "train")
    finished_project.commit("a folder of data")
    write_jsonl(folder / "data/local/mine/b.jsonl", [message("x", role="prompter"), message("x.a", "x")])
    refused = finished_project.run(*ASIDE, "-S", "max_steps=3", "train", check=False)
    assert stages_run(refused.stdout) == ["train"]
    assert error_line(refused).startswith("error: data/local/mine/b.jsonl is not in this experiment's folder")
    assert "`git add --force data/local/mine`" in error_line(refused)
    track(finished_project)
    assert stages_run(finished_project.run(*ASIDE, "-S", "max_steps=3", "train").stdout)[:2] == ["fetch", "prepare"]
