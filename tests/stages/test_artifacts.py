"""Outputs appear completely or not at all."""

import errno

import pytest

from stages.common.artifacts import digest_files, read_json, read_parquet, write_json, write_whole
from stages.common.errors import StageError


def test_a_failed_block_leaves_the_old_output_and_no_litter(tmp_path):
    target = tmp_path / "out"
    with write_whole(target) as folder:
        folder.mkdir()
        (folder / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), write_whole(target) as folder:
        folder.mkdir()
        (folder / "file").write_text("new")
        _ = 1 / 0
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_left_is_replaced(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/litter").write_text("x")
    with write_whole(tmp_path / "out") as path:
        path.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_one_clear_line(tmp_path):
    with pytest.raises(StageError, match="the disk is full"), write_whole(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_digest_follows_names_and_contents_but_not_the_place(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place / "data/sub").mkdir(parents=True)
        (tmp_path / place / "data/sub/x").write_text("1")
    first, second = (digest_files([tmp_path / place / "data"]) for place in ("a", "b"))
    assert first == second
    (tmp_path / "b/data/sub/x").rename(tmp_path / "b/data/sub/y")
    assert digest_files([tmp_path / "b/data"]) != first


def test_missing_and_damaged_inputs_are_named(tmp_path):
    with pytest.raises(StageError, match="is missing. Run `dvc repro`"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(StageError, match="not valid JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(StageError, match="is missing"):
        read_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(StageError, match="cannot be read"):
        read_parquet(tmp_path / "x.parquet")


def test_json_keeps_order_and_letters(tmp_path):
    write_json(tmp_path / "x.json", {"b": 1, "a": "ü"})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "ü"\n}\n'
