"""Kills at any moment: the next run repairs what they leave, and the outputs are the same."""

import json
import os
import subprocess

import psutil
import pytest

from tests.support.project import STAGES, stages_run, wait_for
from tests.whole.kills import Unbroken, locked_outputs, run_with_kills

pytestmark = pytest.mark.slow


@pytest.mark.timeout(1800)
def test_a_few_kills_change_nothing(finished, finished_project):
    """To the adapter only: `make test-long` kills every stage, many times."""
    stages = STAGES[: STAGES.index("train") + 1]
    seconds = {stage: finished.seconds[stage] for stage in stages}
    unbroken = Unbroken(seconds, locked_outputs(finished.folder, stages))
    where, compared, repaired = run_with_kills(finished_project, 3, 5, ("train",), unbroken)
    assert repaired <= 1  # only where the kill hits DVC as it writes its own files
    assert where.total() == 3 and compared >= 1 and where["dvc"] == 0


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_fifty_kills_change_nothing(tiny_project):
    where, compared, repaired = run_with_kills(tiny_project, 50, 1)
    assert repaired <= 5
    assert where.total() == 50 and compared >= 7 and set(where) == set(STAGES), where


def test_what_a_kill_leaves_of_dvcs_own_files_is_repaired(finished_project):
    folder = finished_project.folder
    complete = locked_outputs(folder)
    text = (folder / "dvc.lock").read_text()
    for damaged in (text[: text.index("hash: md5") + 4], text[: text.index("\n    - path")]):
        (folder / "dvc.lock").write_text(damaged)
        (folder / ".dvc/tmp/rwlock").write_text('{"read": {"')
        again = finished_project.run("commands", "repro").stdout
        assert ".dvc/tmp/rwlock was incomplete, and is now .dvc/tmp/rwlock.damaged" in again
        assert "dvc.lock was incomplete, and is now .dvc/tmp/dvc.lock.damaged" in again
        assert stages_run(again) == [] and locked_outputs(folder) == complete  # DVC's cache of runs has it all
    (folder / "dvc.lock").write_text("<<<<<<< HEAD\na: 1\n=======\n")
    refused = finished_project.run("commands", "repro", check=False)
    assert refused.returncode == 1 and "error: dvc.lock holds a merge conflict" in refused.stderr


def test_the_locks_of_killed_processes_that_nobody_collected_are_no_bar(finished_project):
    made = str(finished_project.folder / "data/prepared")
    again = ("repro", "--force", "--single-item", "prepare")
    zombie = subprocess.Popen(["true"])
    wait_for(lambda: psutil.Process(zombie.pid).status() == psutil.STATUS_ZOMBIE)
    rwlock = finished_project.folder / ".dvc/tmp/rwlock"
    held = {"read": {}, "write": {made: {"pid": zombie.pid, "cmd": "dvc repro"}}}
    rwlock.write_text(json.dumps(held))
    refused = finished_project.run("dvc", *again, check=False)
    assert "is busy, it is being blocked by" in refused.stderr  # as DVC alone would have it
    rwlock.write_text(json.dumps(held))
    assert stages_run(finished_project.run("commands", *again).stdout) == ["prepare"]
    # A dead one beside a living one is no bar, and a living one is respected.
    alive = {"pid": os.getpid(), "cmd": "dvc repro"}
    elsewhere = str(finished_project.folder / "models/merged")
    rwlock.write_text(json.dumps({"read": {elsewhere: [alive]}, "write": held["write"]}))
    assert stages_run(finished_project.run("commands", *again).stdout) == ["prepare"]
    rwlock.write_text(json.dumps({"read": {}, "write": {made: {"pid": os.getpid(), "cmd": "dvc repro"}}}))
    assert finished_project.run("commands", *again, check=False).returncode != 0
    zombie.wait()
