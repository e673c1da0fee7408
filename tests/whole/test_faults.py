"""What happens to a run: kills, signals, a full disk, a second run beside it. Nothing is lost or fixed by hand."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from stages.common.artifacts import digest_files
from tests.support.project import STAGES, Project, error_line, outputs_of, stages_run, wait_for
from tests.whole.kills import Unbroken, locked_outputs, run_with_kills

pytestmark = pytest.mark.slow


def stage_process(dvc: subprocess.Popen, stage: str) -> psutil.Process:
    """The process of a stage that `dvc` has begun."""
    command = ["-m", "stages", stage]

    found: list[psutil.Process] = []

    def look() -> bool:
        with suppress(psutil.Error):  # one that ends meanwhile
            found.extend(p for p in psutil.Process(dvc.pid).children(recursive=True) if p.cmdline()[1:] == command)
        return bool(found)

    wait_for(look)
    return found[0]


def is_locked(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


# Kills -----------------------------------------------------------------------------------------------------------


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


def test_what_a_kill_leaves_of_dvcs_own_files_is_repaired(warm_project):
    folder = warm_project.folder
    complete = locked_outputs(folder)
    text = (folder / "dvc.lock").read_text()
    for damaged in (text[: text.index("hash: md5") + 4], text[: text.index("\n    - path")]):
        (folder / "dvc.lock").write_text(damaged)
        (folder / ".dvc/tmp/rwlock").write_text('{"read": {"')
        again = warm_project.run("commands", "repro").stdout
        assert ".dvc/tmp/rwlock was incomplete, and is now .dvc/tmp/rwlock.damaged" in again
        assert "dvc.lock was incomplete, and is now .dvc/tmp/dvc.lock.damaged" in again
        assert stages_run(again) == [] and locked_outputs(folder) == complete  # DVC's cache of runs has it all
    (folder / "dvc.lock").write_text("<<<<<<< HEAD\na: 1\n=======\n")
    refused = warm_project.run("commands", "repro", check=False)
    assert refused.returncode == 1 and "error: dvc.lock holds a merge conflict" in refused.stderr


def test_the_locks_of_killed_processes_that_nobody_collected_are_no_bar(warm_project):
    made = str(warm_project.folder / "data/prepared")
    again = ("repro", "--force", "--single-item", "prepare")
    zombie = subprocess.Popen(["true"])
    wait_for(lambda: psutil.Process(zombie.pid).status() == psutil.STATUS_ZOMBIE)
    rwlock = warm_project.folder / ".dvc/tmp/rwlock"
    held = {"read": {}, "write": {made: {"pid": zombie.pid, "cmd": "dvc repro"}}}
    rwlock.write_text(json.dumps(held))
    refused = warm_project.run("dvc", *again, check=False)
    assert "is busy, it is being blocked by" in refused.stderr  # as DVC alone would have it
    rwlock.write_text(json.dumps(held))
    assert stages_run(warm_project.run("commands", *again).stdout) == ["prepare"]
    # A dead one beside a living one is no bar, and a living one is respected.
    alive = {"pid": os.getpid(), "cmd": "dvc repro"}
    elsewhere = str(warm_project.folder / "models/merged")
    rwlock.write_text(json.dumps({"read": {elsewhere: [alive]}, "write": held["write"]}))
    assert stages_run(warm_project.run("commands", *again).stdout) == ["prepare"]
    rwlock.write_text(json.dumps({"read": {}, "write": {made: {"pid": os.getpid(), "cmd": "dvc repro"}}}))
    assert warm_project.run("commands", *again, check=False).returncode != 0
    zombie.wait()


# Signals ---------------------------------------------------------------------------------------------------------


# Long: a resume is in test_pipeline, a saved step in the two tests below. This one puts them together.
@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_repro_saves_its_step_and_goes_on(finished_project, number):
    folder = finished_project.folder
    finished_project.set(max_steps=60, save_steps=4, eval_steps=30)
    finished_project.run("dvc", "repro", "train")
    unbroken = [digest_files([folder / name]) for name in ("models/adapter", "reports/loss")]
    finished_project.remove("models/adapter", "reports/loss", ".dvc/cache", "dvc.lock")
    finished_project.run("dvc", "repro", "tokenize")
    # As a terminal does it: to DVC and its stage together.
    process = finished_project.start("dvc", "repro", "train")
    wait_for(lambda: list(folder.glob("models/checkpoints/*/checkpoint-8")))
    os.killpg(process.pid, number)
    said = process.communicate(timeout=300)[0]
    assert process.returncode != 0 and "Traceback" not in said
    line = next(line for line in said.splitlines() if line.startswith("error:"))
    stopped = re.fullmatch(
        rf"error: stopped by {number.name} after step (\d+) of 60, .*`dvc repro` goes on from there.", line
    )
    assert stopped, line
    assert (folder / "models/adapter").exists() is False
    resumed = finished_project.run("dvc", "repro", "train").stdout
    assert f"checkpoint-{stopped[1]}\n" in resumed
    assert [digest_files([folder / name]) for name in ("models/adapter", "reports/loss")] == unbroken
    assert not (folder / "models/checkpoints").exists()


def in_its_steps(said: Path) -> bool:
    """Whether a training whose output goes to `said` has done a step: from its first one on it listens."""
    return bool(re.search(r" [1-9]\d*/100000 ", said.read_text(encoding="utf-8")))


def test_a_terminated_repro_leaves_no_stage_running(finished_project, tmp_path):
    """SIGTERM to the one process that was started, as a scheduler sends it: DVC would leave its stage running."""
    finished_project.set(max_steps=100_000, save_steps=50_000, eval_steps=50_000)
    with (tmp_path / "said").open("w") as output:
        process = finished_project.start("commands", "repro", "train", output=output)
        wait_for(lambda: in_its_steps(tmp_path / "said"))
        family = psutil.Process(process.pid).children(recursive=True)
        assert any(member.cmdline()[-2:] == ["stages", "train"] for member in family)
        process.terminate()
        process.wait(timeout=300)
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert process.returncode not in (0, None)
    assert re.search(r"error: stopped by SIGTERM after step \d+ of 100000, which is saved", said), said
    assert all(has_ended(member) for member in family)
    assert list(finished_project.folder.glob("models/checkpoints/*/checkpoint-*/seal.json"))


def test_a_terminated_group_saves_its_step(finished_project, tmp_path):
    """SIGTERM to all of a `make all` at once, as `timeout`, systemd and SLURM send it; parents forward it, too."""
    finished_project.set(max_steps=100_000, save_steps=50_000, eval_steps=50_000)
    finished_project.make_environment()
    with (tmp_path / "said").open("w") as output:
        process = finished_project.start("make", "all", output=output)
        wait_for(lambda: in_its_steps(tmp_path / "said"))
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=300)
    assert process.returncode != 0
    wait_for(lambda: list(finished_project.folder.glob("models/checkpoints/*/checkpoint-*/seal.json")))
    wait_for(lambda: "error: stopped by SIGTERM after step" in (tmp_path / "said").read_text(encoding="utf-8"))
    assert "Traceback" not in (tmp_path / "said").read_text(encoding="utf-8")


def test_a_stage_whose_dvc_was_killed_is_waited_for(finished_project, tmp_path):
    """Its shortest stage, held up by SIGSTOP: a lock file does the same for every stage."""
    again = ("repro", "--force", "--single-item", "prepare")
    first = finished_project.start("dvc", *again)
    stage = stage_process(first, "prepare")
    wait_for(lambda: is_locked(finished_project.folder / ".dvc/tmp/prepare.lock"))
    stage.suspend()
    first.kill()
    first.wait()
    assert not has_ended(stage)
    with (tmp_path / "said").open("w") as output:
        second = finished_project.start("commands", *again, output=output)
        wait_for(
            lambda: "another prepare runs in this folder: waiting until it ends" in (tmp_path / "said").read_text()
        )
        stage.resume()
        assert second.wait(timeout=300) == 0
    assert has_ended(stage)
    assert finished_project.git("status", "--porcelain") == ""
    assert "up to date" in finished_project.run("dvc", "status", "prepare").stdout
    assert not list(finished_project.folder.rglob(".*.partial"))


def test_a_stage_that_is_stopped_clears_up_and_says_so(finished_project):
    process = finished_project.start("stages", "fetch_model")
    wait_for(lambda: list(finished_project.folder.glob("*/.*.partial")) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert said.splitlines()[-1] == "error: stopped before the end. No output was changed; `dvc repro` resumes."
    assert not list(finished_project.folder.glob("*/.*.partial"))
    assert finished_project.run("dvc", "status", "fetch_model").stdout.strip().endswith("up to date.")


# A full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk():
    """A disk of 48 MiB that only the commands run through it see; and it, as this process sees it."""
    command = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        "mount -t tmpfs -o size=48m tmpfs /mnt && echo ready && exec sleep 3600",
    ]
    try:
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if holder.stdout is None or holder.stdout.readline() != "ready\n":
        pytest.skip("a disk may not be mounted here: run as root")
    yield SmallDisk(holder.pid)
    holder.kill()
    holder.wait()


class SmallDisk:
    def __init__(self, pid: int) -> None:
        self.pid, self.path = pid, Path(f"/proc/{pid}/root/mnt")

    def fill(self, room: int) -> None:
        """Leave `room` bytes."""
        free = os.statvfs(self.path).f_bavail * os.statvfs(self.path).f_frsize
        with (self.path / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free - room))

    def empty(self) -> None:
        (self.path / "filler").unlink()

    def run(self, project, *module: str) -> subprocess.CompletedProcess:
        command = ["nsenter", f"--target={self.pid}", "--mount", "sh", "-c", 'cd /mnt/project; exec "$@"', "sh"]
        command += [sys.executable, "-m", *module]
        return subprocess.run(command, env=project.environment(), capture_output=True, text=True)


def everything(folder: Path) -> str:
    return digest_files([folder / name for name in ("data", "models", "reports") if (folder / name).exists()])


def check_a_full_disk(project: Project, stage: str, folder: Path, disk: SmallDisk, rooms: tuple[int, ...]) -> None:
    """Run a stage of the project in `folder` with so much room: it fails in one line, and all is as before."""
    before = everything(folder)
    # What is kept is told from what is made anew by a mark; its own outputs no stage reads.
    old = [path for name in outputs_of(stage) for path in sorted((folder / name).rglob("*")) or [folder / name]]
    for path in (path for path in old if path.is_file()):
        path.write_bytes(path.read_bytes() + b"\nof an earlier run\n")
    marked = everything(folder)
    for room in rooms:
        disk.fill(room)
        line = error_line(disk.run(project, "stages", stage))
        assert "the disk is full. Free some space" in line, (stage, room, line)
        assert not list(folder.rglob(".*.partial")) and not list(folder.glob("models/checkpoints/*/*")), stage
        shutil.rmtree(folder / "models/checkpoints", ignore_errors=True)
        assert everything(folder) == marked, (stage, room)
        disk.empty()
    again = disk.run(project, "stages", stage)
    assert again.returncode == 0, again.stderr[-3000:]
    assert everything(folder) == before


# With no room at all, and with room for the beginning of what it writes. The other stages write their outputs in the
# same way: they are long.
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "stages",
    [
        pytest.param(["fetch_model", "prepare"], id="fetch_model and prepare"),
        pytest.param(STAGES, marks=pytest.mark.long, id="all"),
    ],
)
def test_a_full_disk_is_one_line_and_loses_nothing(stages, finished_project, small_disk):
    folder = small_disk.path / "project"
    left_out = shutil.ignore_patterns(".git", ".home", "cache", "__pycache__")
    shutil.copytree(finished_project.folder, folder, ignore=left_out)
    for stage in stages:
        rooms = (0,) if stage in ("fetch", "prepare") else (8 << 10,) if len(stages) < len(STAGES) else (0, 8 << 10)
        check_a_full_disk(finished_project, stage, folder, small_disk, rooms)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_what_a_full_disk_stopped_under_dvc_is_restored(finished_project, small_disk):
    """DVC removes a stage's outputs before it runs it; they come back, from its cache."""
    folder = small_disk.path / "project"
    shutil.copytree(finished_project.folder, folder, ignore=shutil.ignore_patterns(".home", "__pycache__"))
    before, lock = everything(folder), (folder / "dvc.lock").read_bytes()
    for stage in STAGES:
        for name in outputs_of(stage):  # as DVC is about to, which would make room just for the same again
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        small_disk.fill(8 << 10)
        failed = small_disk.run(finished_project, "dvc", "repro", "--force", "--single-item", stage)
        small_disk.empty()
        said = failed.stdout + failed.stderr
        assert failed.returncode != 0 and re.search("No space left|the disk is full", said), (stage, said[-3000:])
        assert "Traceback" not in said, (stage, said[-3000:])
        assert (folder / "dvc.lock").read_bytes() == lock, stage
        restored = small_disk.run(finished_project, "commands", "repro", stage)
        assert restored.returncode == 0, (stage, restored.stderr[-3000:])
        assert everything(folder) == before, stage


@pytest.mark.long
def test_a_disk_too_full_for_dvcs_cache_loses_nothing(tiny_project, small_disk):
    """The stage has room for its outputs, DVC none for its copies of them."""
    folder = small_disk.path / "project"
    shutil.copytree(tiny_project.folder, folder, ignore=shutil.ignore_patterns(".home", "__pycache__"))
    small_disk.run(tiny_project, "dvc", "repro", "fetch", "fetch_model")
    expected = (folder / "dvc.lock").read_bytes()
    made = sum(path.stat().st_size for name in ("data/raw", "models/base") for path in (folder / name).rglob("*"))
    for name in ("dvc.lock", "data/raw", "models/base", ".dvc/cache"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    small_disk.fill(made + (64 << 10))
    result = small_disk.run(tiny_project, "commands", "repro", "fetch", "fetch_model")
    assert result.returncode != 0 and "No space left on device" in result.stderr and "Traceback" not in result.stderr
    small_disk.empty()
    again = small_disk.run(tiny_project, "commands", "repro", "fetch", "fetch_model")
    assert again.returncode == 0, again.stderr[-3000:]
    assert (folder / "dvc.lock").read_bytes() == expected


# Two at once -----------------------------------------------------------------------------------------------------


def test_of_two_runs_at_once_the_second_waits(warm_project):
    warm_project.make_environment()
    warm_project.set(max_new_tokens=9)
    both = [warm_project.start("make", "all") for _ in range(2)]
    said = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(stages_run(text) for text in said) == [[], ["evaluate"]]
    assert all("For CPUs: models/onnx/" in text for text in said)
    assert sum("another make runs in this folder: waiting until it ends" in text for text in said) == 1


def test_a_dvc_beside_it_is_refused_by_dvcs_lock(finished_project):
    first = finished_project.start("dvc", "repro", "--force", "--single-item", "prepare")
    stage = stage_process(first, "prepare")
    stage.suspend()
    second = finished_project.run("dvc", "repro", "--force", "--single-item", "prepare", check=False)
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
def test_experiments_beside_each_other_do_not_disturb_each_other(finished_project):
    def settings(steps: int) -> list[str]:
        return ["-S", f"max_steps={steps}", "-S", "save_steps=1"]

    finished_project.git("add", "--force", "data/local", "models/local")
    finished_project.commit("data and model")
    for steps in (1, 2, 3):
        result = finished_project.run("dvc", "exp", "run", "--temp", "--name", f"alone-{steps}", *settings(steps))
        assert stages_run(result.stdout)[-1] in ("evaluate", "export")
    shutil.rmtree(finished_project.folder / ".dvc/cache/runs", ignore_errors=True)
    for steps in (2, 3):
        finished_project.run("dvc", "exp", "run", "--queue", "--name", f"queued-{steps}", *settings(steps))
    finished_project.run("dvc", "queue", "start", "--jobs", "2")
    aside = finished_project.run("dvc", "exp", "run", "--temp", "--name", "aside", *settings(1), check=False)
    assert aside.returncode == 0, aside.stderr[-2000:]
    end = time.monotonic() + 1800
    while time.monotonic() < end and re.search("Running|Queued", finished_project.run("dvc", "queue", "status").stdout):
        time.sleep(5)
    status = finished_project.run("dvc", "queue", "status").stdout
    assert status.count("Success") == 2, status

    def lock(name: str) -> str:
        refs = finished_project.git("for-each-ref", "--format=%(refname)", "refs/exps").split()
        ref = next(ref for ref in refs if ref.endswith(f"/{name}"))
        return finished_project.git("show", f"{ref}:dvc.lock")

    alone = {steps: lock(f"alone-{steps}") for steps in (1, 2, 3)}
    assert len(set(alone.values())) == 3
    assert {1: lock("aside"), 2: lock("queued-2"), 3: lock("queued-3")} == alone
    assert finished_project.git("status", "--porcelain") == ""
