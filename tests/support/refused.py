"""Stages that refuse: run in this process, one error line, and nothing half-written."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from stages.common.artifacts import digest_files
from stages.common.entry import run as run_entry
from tests.support.project import PIPELINE, outputs_of

OLD = "of an earlier run\n"
# What tells a user where to turn: a path or key to correct, or a command to run.
HOW_TO_FIX = re.compile(
    r"dvc repro|make all|in params\.yaml|recipe|Fix|Correct|[Ss]et |Put |[Rr]aise|Move|Choose|[Ll]oosen|Delete|Copy"
    r"|must (be|have|match) |see the table|did you mean |use one of: |write file:"
)


def run(name: str) -> None:
    """A stage, or the command of this name, in this process."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        run_entry(f"{'stages' if name in PIPELINE else 'commands'}.{name}", lock=name)
    finally:
        signal.signal(signal.SIGTERM, before)


def everything_made() -> str:
    return digest_files([Path(name) for name in ("data", "models", "reports") if Path(name).exists()])


def refused(stage: str, capsys) -> str:
    """The stage's one error line; asserts that it exits with 1, and that its earlier outputs are as they were."""
    for name in outputs_of(stage):
        out = Path(name)
        if out.suffix:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(OLD)
        elif not out.exists():
            out.mkdir(parents=True)
            (out / "old").write_text(OLD)
    before = everything_made()
    with pytest.raises(SystemExit) as stopped:
        run(stage)
    said = str(stopped.value.code)  # Python prints it, and exits with 1
    assert said.startswith("error: ") and len(said.splitlines()) == 1, said
    assert len(said) < 700 and HOW_TO_FIX.search(said), said
    assert "Traceback" not in capsys.readouterr().err
    shutil.rmtree("models/checkpoints", ignore_errors=True)
    assert everything_made() == before
    assert not list(Path(".").rglob(".*.partial"))
    return said


def edit_json(path, **values) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(values)
    path.write_text(json.dumps(content), encoding="utf-8")


def truncate(path, keep: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
