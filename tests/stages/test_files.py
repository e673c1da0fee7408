"""Which files of a folder are read, how, and which are named because they are not."""

import pytest

from stages.conversations.files import data_files, name_in
from stages.conversations.messages import Counts, read_messages
from tests.support.rows import write_jsonl

ROW = {"question": "Q, really", "answer": "A"}


def test_endings_in_capitals_and_other_names_of_a_format_are_read(tmp_path):
    for i, name in enumerate(("a.jsonl", "b.JSONL", "c.ndjson", "d.Jsonl")):
        write_jsonl(tmp_path / name, [{**ROW, "question": f"Q{i}"}])
    (tmp_path / "e.CSV").write_text("question,answer\nQ4,A\n")
    table = read_messages(tmp_path)
    assert list(table["text"][::2]) == ["Q0", "Q1", "Q2", "Q3", "Q4"]
    assert list(table["message_tree_id"][::2]) == ["a-1", "b-1", "c-1", "d-1", "e-1"]


def test_tsv_has_tabs_however_many_commas_its_header_has(tmp_path):
    (tmp_path / "x.tsv").write_text("question\tanswer\ta,b,c,d\nQ, really\tA\tx\n")
    counts = Counts()
    assert list(read_messages(tmp_path, counts=counts)["text"]) == ["Q, really", "A"]
    assert counts.notes() == ["columns that are not read: a,b,c,d (1 rows)"]


@pytest.mark.parametrize("name", ["x.jsonl.bz2", "x.txt", "sub/x.xlsx", "x.jsonl.xz", "x.zip", "x.jsonl.bak", "x"])
def test_a_file_that_may_hold_data_and_is_not_read_is_named_once(tmp_path, name):
    write_jsonl(tmp_path / "a.jsonl", [ROW])
    (tmp_path / "sub").mkdir()
    (tmp_path / name).write_text("x")
    counts = Counts()
    read_messages(tmp_path, counts=counts)
    assert counts.notes() == [f"files that are not read: {name}"]


def test_what_is_known_to_hold_no_rows_is_not_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [ROW])
    write_jsonl(tmp_path / "notice.jsonl", [ROW])
    beside = ("README.md", "readme.txt", "LICENSE", "LICENCE.txt", ".gitignore", ".cache/x.bin", "a.jsonl.dvc")
    for name in (*beside, "dataset_info.json", "state.json", "cache-1.arrow"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    counts = Counts()
    read_messages(tmp_path, counts=counts)
    assert counts.notes() == []
    assert [name_in(file, tmp_path) for file in data_files(tmp_path)] == ["a.jsonl", "notice.jsonl"]
