"""The one entry: its environment is set before a stage is imported, an expected failure is one line."""

import os
import runpy
import signal
import subprocess
import sys

import pytest

from stages.common import entry
from stages.common.entry import QUIET, run, run_named, set_environment
from stages.common.errors import DISK_FULL
from stages.common.pipeline import read_pipeline
from tests.support.project import ROOT


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Write a module `made_up` whose main() runs these lines; give what runs it as an entry does."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = signal.getsignal(signal.SIGTERM)

    def write(*lines: str):
        body = "\n    ".join(lines)
        (tmp_path / "made_up.py").write_text(f"import errno, os, signal\n\ndef main():\n    {body}\n")
        monkeypatch.delitem(sys.modules, "made_up", raising=False)
        return lambda **options: run("made_up", **options)

    yield write
    signal.signal(signal.SIGTERM, before)
    sys.modules.pop("made_up", None)


def test_an_expected_failure_is_one_line_and_a_bug_a_traceback(stage):
    with pytest.raises(SystemExit) as caught:
        stage("from stages.common.errors import StageError", "raise StageError('what, where, how')")()
    assert caught.value.code == "error: what, where, how"
    with pytest.raises(RuntimeError):
        stage("raise RuntimeError('a bug')")()


def test_a_full_disk_is_one_line_also_where_no_output_was_being_written(stage):
    with pytest.raises(SystemExit) as caught:
        stage("raise OSError(errno.ENOSPC, 'No space left on device')")()
    assert caught.value.code == f"error: {DISK_FULL}"
    with pytest.raises(OSError):
        stage("raise OSError(errno.EACCES, 'Permission denied')")()


def test_a_signal_is_one_line_and_its_own_status(stage, capsys):
    stages_remedy, commands_remedy = "No output was changed; `dvc repro` resumes.", "Run the same command again."
    for lock, remedy in (("made-up", stages_remedy), (None, commands_remedy)):
        for end in ("os.kill(os.getpid(), signal.SIGTERM)", "raise KeyboardInterrupt"):
            with pytest.raises(SystemExit) as caught:
                stage(end, "signal.pause()")(lock=lock)
            assert caught.value.code == 130
            assert capsys.readouterr().err == f"error: stopped before the end. {remedy}\n"


def test_a_second_process_of_a_stage_waits_for_the_first(stage, tmp_path):
    """The lock is a lock file, and ends with the process that holds it."""
    stage("pass")(lock="made_up")
    assert (tmp_path / ".dvc/tmp/made_up.lock").is_file()
    hold = "import sys; from stages.common.locks import hold; hold('made_up', 'another one'); print('held', flush=True)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(
        [sys.executable, "-c", f"{hold}; sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert first.stdout.readline() == "held\n"
    second = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, env=environment, text=True)
    assert second.stdout.readline() == "another one runs in this folder: waiting until it ends\n"
    assert second.poll() is None
    first.kill()
    assert second.communicate(timeout=30)[0] == "held\n" and second.returncode == 0
    first.communicate()


def test_a_name_that_is_none_is_one_line(monkeypatch):
    for arguments in ([], ["nonsense"]):
        monkeypatch.setattr(sys, "argv", ["stages", *arguments])
        with pytest.raises(SystemExit) as caught:
            run_named("stages", {"fetch": True, "train": False}, lock=True)
        name = arguments[0] if arguments else "NAME"
        assert caught.value.code == f"error: python -m stages {name}: NAME is one of fetch, train"


def test_libraries_are_quiet_and_offline_before_they_are_imported(monkeypatch):
    for name in (*QUIET, "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    set_environment(network=True)
    assert QUIET.items() <= os.environ.items() and "HF_HUB_OFFLINE" not in os.environ
    set_environment(network=False)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    # What imports none of them: otherwise they would have read the environment too early.
    libraries = {"torch", "transformers", "datasets", "huggingface_hub", "trl", "bitsandbytes"}
    check = f"import sys; import stages.common.entry; print(sorted({libraries} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def entered(package: str, monkeypatch) -> tuple[dict[str, bool], bool]:
    """What `python -m package` hands to run_named: each name with whether it may reach the network; the lock."""
    calls = []
    monkeypatch.setattr(entry, "run_named", lambda name, networked, *, lock: calls.append((name, networked, lock)))
    runpy.run_module(package, run_name="__main__")
    ((name, networked, lock),) = calls
    assert name == package
    return networked, lock


def test_each_stage_of_the_pipeline_is_entered_under_a_lock_and_only_those_that_fetch_reach_the_network(monkeypatch):
    networked, lock = entered("stages", monkeypatch)
    assert lock and list(networked) == list(read_pipeline(ROOT))
    assert [name for name, network in networked.items() if network] == ["fetch", "fetch_model"]
    for name, stage in read_pipeline(ROOT).items():
        assert stage["cmd"] == f"python -m stages {name}"


def test_each_command_is_entered(monkeypatch):
    networked, lock = entered("commands", monkeypatch)
    assert not lock  # `make all` holds its own
    modules = {p.stem for p in (ROOT / "commands").glob("*.py") if "\ndef main()" in p.read_text(encoding="utf-8")}
    assert set(networked) == modules
