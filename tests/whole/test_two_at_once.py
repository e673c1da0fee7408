"""Two runs at once: the second waits or is refused, and neither disturbs the other."""

import re
import shutil
import subprocess
import time

import pytest

from tests.support.processes import stage_process
from tests.support.project import stages_run

pytestmark = pytest.mark.slow


def test_of_two_runs_at_once_the_second_waits(finished_project):
    finished_project.make_environment()
    finished_project.set(max_new_tokens=9)
    both = [finished_project.start("make", "all") for _ in range(2)]
    said = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(stages_run(text) for text in said) == [[], ["evaluate", "export"]]
    assert all("For CPUs: models/onnx/" in text for text in said)
    assert sum("another make runs in this folder: waiting until it ends" in text for text in said) == 1


def test_a_dvc_beside_it_is_refused_by_dvcs_lock(cold_project):
    first = cold_project.start("dvc", "repro", "--force", "--single-item", "prepare")
    stage = stage_process(first, "prepare")
    stage.suspend()
    second = cold_project.run("dvc", "repro", "--force", "--single-item", "prepare", check=False)
    stage.resume()
    assert second.returncode != 0
    assert re.search("is busy, it is being blocked by|Unable to acquire lock", second.stderr), second.stderr
    first.communicate(timeout=300)
    assert first.returncode == 0


def test_of_two_set_ups_at_once_only_one_installs(project):
    (project.folder / "requirements.lock").write_text("# nothing\n")
    env = project.environment()
    both = [
        subprocess.Popen(
            ["make", "setup"], cwd=project.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "".join(said).count("Installing") == 1, said
    assert (project.folder / ".venv/installed").exists()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_experiments_beside_each_other_do_not_disturb_each_other(cold_project):
    def settings(steps: int) -> list[str]:
        return ["-S", f"max_steps={steps}", "-S", "save_steps=1"]

    cold_project.git("add", "--force", "data/local", "models/local")
    cold_project.commit("data and model")
    for steps in (1, 2, 3):
        result = cold_project.run("dvc", "exp", "run", "--temp", "--name", f"alone-{steps}", *settings(steps))
        assert stages_run(result.stdout)[-1] in ("evaluate", "export", "gguf")
    shutil.rmtree(cold_project.folder / ".dvc/cache/runs", ignore_errors=True)
    for steps in (2, 3):
        cold_project.run("dvc", "exp", "run", "--queue", "--name", f"queued-{steps}", *settings(steps))
    cold_project.run("dvc", "queue", "start", "--jobs", "2")
    aside = cold_project.run("dvc", "exp", "run", "--temp", "--name", "aside", *settings(1), check=False)
    assert aside.returncode == 0, aside.stderr[-2000:]
    end = time.monotonic() + 1800
    while time.monotonic() < end and re.search("Running|Queued", cold_project.run("dvc", "queue", "status").stdout):
        time.sleep(5)
    status = cold_project.run("dvc", "queue", "status").stdout
    assert status.count("Success") == 2, status

    def lock(name: str) -> str:
        refs = cold_project.git("for-each-ref", "--format=%(refname)", "refs/exps").split()
        ref = next(ref for ref in refs if ref.endswith(f"/{name}"))
        return cold_project.git("show", f"{ref}:dvc.lock")

    alone = {steps: lock(f"alone-{steps}") for steps in (1, 2, 3)}
    assert len(set(alone.values())) == 3
    assert {1: lock("aside"), 2: lock("queued-2"), 3: lock("queued-3")} == alone
    assert cold_project.git("status", "--porcelain") == ""
