"""Bad rows and data files, as tables: each case is one line that says what, where and how to fix it, or is counted.

Every case runs its stage as `python -m stages NAME` does, in this process, over a small project whose earlier outputs
must stay as they are.
"""

import gzip
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from tests.support.project import set_params
from tests.support.refused import refused, run
from tests.support.rows import message, small_trees, write_jsonl

FILES = {
    "empty file": ("x.jsonl", b"", "hold no rows"),
    "only blank lines": ("x.jsonl", b"\n \n\n", "hold no rows"),
    "HTML error page": ("x.jsonl", b"<!doctype html>\n<html>404</html>\n", "x.jsonl line 1: not valid JSON"),
    "HTML error page, gzipped": ("x.jsonl.gz", gzip.compress(b"<html>404</html>\n"), "x.jsonl.gz line 1: not valid"),
    "one JSON array": ("x.jsonl", b'[{"message_id": "a"}]\n', "x.jsonl line 1: not a JSON object"),
    "pretty-printed JSON": ("x.jsonl", b'{\n "message_id": "a"\n}\n', "x.jsonl line 1: not valid JSON"),
    "UTF-16": ("x.jsonl", '{"message_id": "a"}\n'.encode("utf-16"), "x.jsonl is not UTF-8 (it is UTF-16)"),
    "Latin-1": ("x.jsonl", '{"text": "é"}\n'.encode("latin-1"), "x.jsonl line 1: not UTF-8"),
    "CSV named .jsonl": ("x.jsonl", b"message_id,text\na,b\n", "it begins with 'message_id,text'"),
    "only NUL bytes": ("x.jsonl", b"\0" * 4096, "x.jsonl line 1: not valid JSON"),
    "no such file type": ("x.txt", b"a,b\n", "holds no .jsonl"),
    "a git-lfs pointer": ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "line 1: not valid JSON"),
    "not gzip": ("x.jsonl.gz", b"not gzip", "x.jsonl.gz cannot be read"),
    "truncated gzip": ("x.jsonl.gz", gzip.compress(b'{"message_id": "a"}\n' * 99)[:-20], "x.jsonl.gz cannot be read"),
    "damaged gzip": (
        "x.jsonl.gz",
        gzip.compress(b'{"message_id": "a"}\n' * 99)[:20] + b"\xff" * 40,
        "x.jsonl.gz cannot be read",
    ),
    "not parquet": ("x.parquet", b"PAR1 not really", "x.parquet cannot be read"),
    "truncated parquet": ("x.parquet", None, "x.parquet cannot be read"),
    "empty parquet file": ("x.parquet", b"", "x.parquet cannot be read"),
}


def raw_folder(folder: Path) -> Path:
    """The folder of the only data set, as fetch makes it."""
    (folder / "data/raw/1").mkdir(parents=True)
    (folder / "data/raw/source.json").write_text(
        '[{"source": "file:x", "revision": null, "hub": null, "license": null}]'
    )
    return folder / "data/raw/1"


@pytest.mark.parametrize("case", FILES)
def test_a_data_file_that_cannot_be_read(case, folder, capsys):
    name, content, said = FILES[case]
    raw = raw_folder(folder)
    if content is None:
        pd.DataFrame(small_trees(40)).to_parquet(raw / "whole.parquet")
        content = (raw / "whole.parquet").read_bytes()[:-100]
        (raw / "whole.parquet").unlink()
    (raw / name).write_bytes(content)
    assert said in refused("prepare", capsys)


# A row beside 400 good ones, and what is said of it when no bad row is allowed.
BAD_ROWS = {
    "no id": ({"message_id": None}, "message_id is missing"),
    "an id that is a number": ({"message_id": 5}, "message_id is 5, not a string"),
    "an id that is a list": ({"message_id": ["a"]}, "message_id is ['a'], not a string"),
    "no text": ({"text": None}, "text is missing"),
    "a text that is a number": ({"text": 1.5}, "text is 1.5, not a string"),
    "a text that is an object": ({"text": {"en": "hi"}}, "text is {'en': 'hi'}, not a string"),
    "a text of typed blocks": ({"text": [{"type": "text", "text": "hi"}]}, "not a string"),
    "no role": ({"role": None}, "role is missing"),
    "an unknown role": ({"role": "moderator"}, "role is 'moderator', neither"),
    "a role that is a number": ({"role": 1}, "role is 1, not a string"),
    "a role in capitals": ({"role": "Assistant"}, "role is 'Assistant', neither"),
    "a parent that is a number": ({"parent_id": 7}, "parent_id is 7, not a string"),
    "a parent that is a list": ({"parent_id": ["t1"]}, "parent_id is ['t1'], not a string"),
    "a NUL in the text": ({"text": "a\0b"}, "text holds a NUL character"),
    "a NUL in the id": ({"message_id": "a\0"}, "message_id holds a NUL character"),
    "a lone surrogate in the text": ({"text": "a\ud83d"}, "text holds half of a surrogate pair"),
    "a lone surrogate in the id": ({"message_id": "\udc00"}, "message_id holds half of a surrogate pair"),
    "a lone surrogate in the language": ({"lang": "\udfff"}, "lang holds half of a surrogate pair"),
    "a lone surrogate in the tree": ({"message_tree_id": "\ud800"}, "message_tree_id holds half"),
    "a rank that is a text": ({"rank": "first"}, "rank is 'first', not a number"),
    "labels that are a list": ({"labels": ["spam"]}, "labels is ['spam'], not an object of JSON"),
    "a quality that is a text": ({"labels": {"quality": {"value": "high"}}}, "of which quality is not a number"),
    "a toxicity that is a list": ({"detoxify": {"toxicity": [1]}}, "of which toxicity is not a number"),
    "a flag that is a text": ({"deleted": "no"}, "deleted is 'no', neither true nor false"),
    "missing columns": (b'{"a": 1}', "unknown form"),
    "an empty object": (b"{}", "unknown form"),
    "an array": (b"[1, 2]", "not a JSON object"),
    "a bare text": (b'"hello"', "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "a line cut off": (b'{"message_id": "x", "te', "not valid JSON"),
    "two objects on a line": (b'{"a": 1} {"a": 2}', "not valid JSON (Extra data)"),
    "single quotes": (b"{'message_id': 'x'}", "not valid JSON"),
    "bytes that are no UTF-8": (b'{"text": "\xff\xfe"}', "not UTF-8"),
    "brackets without end": (b"[" * 200_000, "not JSON that can be read"),
    "a number without end": (b'{"rank": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
    "an empty conversation": (b'{"messages": []}', "text is missing"),
    "a conversation of texts": (b'{"messages": ["hi", "yo"]}', "role is missing|text is missing"),
    "an answer that is no text": (b'{"instruction": "add", "output": 3}', "text is 3, not a string"),
    "a tree without a message": (b'{"prompt": {}, "message_tree_id": "x"}', "message_id is missing"),
    "replies that are texts": (
        b'{"prompt": {"message_id": "x", "text": "?", "role": "prompter", "replies": ["yes"]}}',
        "message_id is missing",
    ),
}


def write_row(path, row) -> None:
    line = row if isinstance(row, bytes) else json.dumps(message("bad", role="prompter", text="?") | row).encode()
    path.write_bytes(path.read_bytes() + line + b"\n")


@pytest.fixture
def good_rows(folder):
    path = write_jsonl(raw_folder(folder) / "x.jsonl", small_trees(200))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_counted_and_skipped_up_to_the_bound(case, folder, good_rows, capsys):
    row, said = BAD_ROWS[case]
    write_row(good_rows, row)
    run("prepare")
    funnel = json.loads((folder / "reports/funnel.json").read_text(encoding="utf-8"))
    assert 1 <= funnel["dropped"]["bad_row"]["messages"] <= 2
    assert sum(split["conversations"] for split in funnel["kept"].values()) == 200
    shutil.rmtree(folder / "data/prepared")
    set_params(folder, max_bad_rows=0)
    line = refused("prepare", capsys)
    assert "x.jsonl line 401: " in line and any(words in line for words in said.split("|")), line
    assert "file:x: 1 of 401 rows cannot be used, more than max_bad_rows, 0" in line


# Rows that are odd, but no reason to stop, however many there are: what the funnel says of them.
ODD_ROWS = {
    "a self-parent": ([message("s", "s", role="prompter")], "orphan"),
    "a cycle": ([message("a", "b", role="prompter"), message("b", "a")], "orphan"),
    "a parent that is nowhere": ([message("a.1", "a")], "orphan"),
    "an id twice": ([message("t0", role="prompter", text="other")], "duplicate_id"),
    "an empty text": ([message("a", role="prompter", text="")], "empty"),
    "white space": ([message("a", role="prompter", text=" \n\t")], "empty"),
    "an assistant who begins": ([message("a")], "wrong_role"),
    "a question without answer": ([message("a", role="prompter")], "unanswered_question"),
    "a rank beyond floats": ([message("a", role="prompter", rank=10**400)], "unanswered_question"),
    "labels of odd types": (
        [message("a", role="prompter", labels={"name": 1, "value": "x"})],
        "unanswered_question",
    ),
    "a language that is a number": ([message("a", role="prompter", lang=3)], "unanswered_question"),
    "unknown columns": ([message("a", role="prompter", colour="blue")], "unanswered_question"),
}


@pytest.mark.parametrize("case", ODD_ROWS)
def test_an_odd_row_is_counted_and_stops_nothing(case, folder, good_rows):
    rows, reason = ODD_ROWS[case]
    for row in rows:
        write_row(good_rows, row)
    set_params(folder, max_bad_rows=0)
    run("prepare")
    funnel = json.loads((folder / "reports/funnel.json").read_text(encoding="utf-8"))
    assert funnel["dropped"][reason]["messages"] == len(rows)
    assert sum(split["conversations"] for split in funnel["kept"].values()) == 200


def test_huge_messages_a_byte_order_mark_and_mixed_schemas_are_read(folder, good_rows):
    huge = "word " * 200_000  # 1 MB
    rows = [
        *(message("h", role="prompter", text=huge), message("h.a", "h", text=huge)),
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        {"instruction": "add", "output": "3"},
        {"message_tree_id": "n", "prompt": message("n", role="prompter") | {"replies": [message("n.a", "n")]}},
    ]
    for row in rows:
        write_row(good_rows, json.dumps(row).encode())
    good_rows.write_bytes(b"\xef\xbb\xbf" + good_rows.read_bytes())
    set_params(folder, max_bad_rows=0)
    run("prepare")
    prepared = pd.concat(
        pd.read_parquet(folder / f"data/prepared/{split}.parquet") for split in ("train", "validation")
    )
    assert len(prepared) == 204
    assert max(len(m["content"]) for messages in prepared["messages"] for m in messages) > 900_000


def test_the_table_is_long():
    assert sum(map(len, (FILES, BAD_ROWS, ODD_ROWS))) >= 70
