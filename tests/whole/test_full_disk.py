"""A full disk: one line, no output is lost, and a rerun succeeds."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.common.artifacts import digest_files
from tests.support.project import STAGES, Project, error_line, outputs_of

pytestmark = pytest.mark.slow


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
    # A mark shows which files are kept and which are made again. No stage reads its own outputs.
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
def test_a_full_disk_is_one_line_and_loses_nothing(stages, cold_project, small_disk):
    folder = small_disk.path / "project"
    left_out = shutil.ignore_patterns(".git", ".home", "cache", "__pycache__")
    shutil.copytree(cold_project.folder, folder, ignore=left_out)
    for stage in stages:
        rooms = (0,) if stage in ("fetch", "prepare") else (8 << 10,) if len(stages) < len(STAGES) else (0, 8 << 10)
        check_a_full_disk(cold_project, stage, folder, small_disk, rooms)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_what_a_full_disk_stopped_under_dvc_is_restored(cold_project, small_disk):
    """DVC removes a stage's outputs before it runs it; they come back, from its cache."""
    folder = small_disk.path / "project"
    shutil.copytree(cold_project.folder, folder, ignore=shutil.ignore_patterns(".home", "__pycache__"))
    before, lock = everything(folder), (folder / "dvc.lock").read_bytes()
    for stage in STAGES:
        for name in outputs_of(stage):  # as DVC is about to, which would make room just for the same again
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        small_disk.fill(8 << 10)
        failed = small_disk.run(cold_project, "dvc", "repro", "--force", "--single-item", stage)
        small_disk.empty()
        said = failed.stdout + failed.stderr
        assert failed.returncode != 0 and re.search("No space left|the disk is full", said), (stage, said[-3000:])
        assert "Traceback" not in said, (stage, said[-3000:])
        assert (folder / "dvc.lock").read_bytes() == lock, stage
        restored = small_disk.run(cold_project, "commands", "repro", stage)
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
