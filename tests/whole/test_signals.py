"""Ctrl-C and SIGTERM: a stage saves its step and clears up, and no process of the run stays."""

import os
import re
import signal
from pathlib import Path

import psutil
import pytest

from stages.common.artifacts import digest_files
from tests.support.processes import has_ended, is_locked, stage_process
from tests.support.project import wait_for

pytestmark = pytest.mark.slow


# Long: a resume is in test_pipeline, a saved step in the two tests below. This one puts them together.
@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_repro_saves_its_step_and_resumes(cold_project, number):
    folder = cold_project.folder
    cold_project.set(max_steps=60, save_steps=4, eval_steps=30)
    cold_project.run("dvc", "repro", "train")
    unbroken = [digest_files([folder / name]) for name in ("models/adapter", "reports/loss")]
    cold_project.remove("models/adapter", "reports/loss", ".dvc/cache", "dvc.lock")
    cold_project.run("dvc", "repro", "tokenize")
    # As a terminal does it: to DVC and its stage together.
    process = cold_project.start("dvc", "repro", "train")
    wait_for(lambda: list(folder.glob("models/checkpoints/*/checkpoint-8")))
    os.killpg(process.pid, number)
    said = process.communicate(timeout=300)[0]
    assert process.returncode != 0 and "Traceback" not in said
    line = next(line for line in said.splitlines() if line.startswith("error:"))
    stopped = re.fullmatch(
        rf"error: stopped by {number.name} after step (\d+) of 60, .*`dvc repro` resumes from there.", line
    )
    assert stopped, line
    assert (folder / "models/adapter").exists() is False
    resumed = cold_project.run("dvc", "repro", "train").stdout
    assert f"checkpoint-{stopped[1]}\n" in resumed
    assert [digest_files([folder / name]) for name in ("models/adapter", "reports/loss")] == unbroken
    assert not (folder / "models/checkpoints").exists()


def in_its_steps(said: Path) -> bool:
    """Whether a training whose output goes to `said` has done a step: from its first one on it listens."""
    return bool(re.search(r" [1-9]\d*/100000 ", said.read_text(encoding="utf-8")))


def test_a_terminated_repro_leaves_no_stage_running(cold_project, tmp_path):
    """SIGTERM to the one process that was started, as a scheduler sends it: DVC would leave its stage running. Several
    at once, as where a parent forwards what its group has got already."""
    cold_project.set(max_steps=100_000, save_steps=50_000, eval_steps=50_000)
    with (tmp_path / "said").open("w") as output:
        process = cold_project.start("commands", "repro", "train", output=output)
        wait_for(lambda: in_its_steps(tmp_path / "said"))
        family = psutil.Process(process.pid).children(recursive=True)
        assert any(member.cmdline()[-2:] == ["stages", "train"] for member in family)
        for _ in range(20_000):  # for about 50 ms
            process.terminate()
        process.wait(timeout=300)
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert process.returncode not in (0, None)
    assert re.search(r"error: stopped by SIGTERM after step \d+ of 100000, which is saved", said), said
    assert all(has_ended(member) for member in family)
    assert list(cold_project.folder.glob("models/checkpoints/*/checkpoint-*/seal.json"))


def test_a_terminated_group_saves_its_step(cold_project, tmp_path):
    """SIGTERM to all of a `make all` at once, as `timeout`, systemd and SLURM send it; parents forward it, too."""
    cold_project.set(max_steps=100_000, save_steps=50_000, eval_steps=50_000)
    cold_project.make_environment()
    with (tmp_path / "said").open("w") as output:
        process = cold_project.start("make", "all", output=output)
        wait_for(lambda: in_its_steps(tmp_path / "said"))
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=300)
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert process.returncode != 0
    assert list(cold_project.folder.glob("models/checkpoints/*/checkpoint-*/seal.json"))
    assert "error: stopped by SIGTERM after step" in said and "Traceback" not in said, said


def test_a_stage_whose_dvc_was_killed_is_waited_for(cold_project, tmp_path):
    """Its shortest stage, held up by SIGSTOP: a lock file does the same for every stage."""
    again = ("repro", "--force", "--single-item", "prepare")
    first = cold_project.start("dvc", *again)
    stage = stage_process(first, "prepare")
    wait_for(lambda: is_locked(cold_project.folder / ".dvc/tmp/prepare.lock"))
    stage.suspend()
    first.kill()
    first.wait()
    assert not has_ended(stage)
    with (tmp_path / "said").open("w") as output:
        second = cold_project.start("commands", *again, output=output)
        wait_for(
            lambda: "another prepare runs in this folder: waiting until it ends" in (tmp_path / "said").read_text()
        )
        stage.resume()
        assert second.wait(timeout=300) == 0
    assert has_ended(stage)
    assert cold_project.git("status", "--porcelain") == ""
    assert "up to date" in cold_project.run("dvc", "status", "prepare").stdout
    assert not list(cold_project.folder.rglob(".*.partial"))


def test_a_stage_that_is_stopped_clears_up_and_says_so(cold_project):
    process = cold_project.start("stages", "fetch_model")
    wait_for(lambda: list(cold_project.folder.glob("*/.*.partial")) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert said.splitlines()[-1] == "error: stopped before the end. No output was changed; `dvc repro` resumes."
    assert not list(cold_project.folder.glob("*/.*.partial"))
    assert cold_project.run("dvc", "status", "fetch_model").stdout.strip().endswith("up to date.")
