"""Data files to the table of messages."""

import pandas as pd
import pytest

from stages.common.errors import StageError
from stages.conversations.files import known_as
from stages.conversations.filters import VALID, keep_messages
from stages.conversations.known import OASST1, check_known
from stages.conversations.messages import check_bad_rows, read_messages
from stages.conversations.selection import Selection
from stages.conversations.threads import find_threads
from tests.support.conversations import params
from tests.support.rows import message, write_jsonl


def test_files_with_like_names_do_not_swallow_each_other(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    for part in (1, 2):
        write_jsonl(tmp_path / f"chat.part{part}.jsonl", [{"messages": turns}])
    assert read_messages(tmp_path)["message_id"].nunique() == 4


def test_two_data_sets_may_use_the_same_ids_for_other_messages(tmp_path):
    rows = [message("1", role="prompter", text="Q"), message("1.a", "1", text="A")]
    for name in "xy":
        write_jsonl(tmp_path / name / "rows.jsonl", [{**row, "text": f"{row['text']} of {name}"} for row in rows])
    tables = [read_messages(tmp_path / name, number) for number, name in enumerate("xy")]
    assert list(tables[0]["message_id"]) == ["1", "1.a"]  # and so is the first one's split what it is alone
    both = pd.concat(tables, ignore_index=True)
    selection = keep_messages(Selection.of(both), VALID, params())
    assert len(selection.messages) == 4 and selection.funnel.dropped["duplicate_id"]["messages"] == 0
    text = selection.values("text")
    threads = [[text[i] for i in ids] for ids in find_threads(selection.messages, "best")]
    assert threads == [["Q of x", "A of x"], ["Q of y", "A of y"]]


def test_known_data_with_other_counts_is_warned_of():
    name = "OpenAssistant/oasst1"
    assert check_known(name, OASST1, 88_838, 10_364) is None
    assert "has 88838 messages in 10364 trees, but 5 in 1" in str(check_known(name, OASST1, 5, 1))
    assert check_known(name, "0" * 40, 5, 1) is None
    assert check_known("file:data/local/mine.jsonl", None, 5, 1) is None


@pytest.mark.parametrize(
    "source, name, shown",
    [
        ("file:data/local/mine.jsonl", "mine.jsonl", "data/local/mine.jsonl"),
        ("file:data/local/mine", "sub/x.csv", "data/local/mine/sub/x.csv"),
        ("file:data/local/mine/", "x.csv", "data/local/mine/x.csv"),
        ("owner/name", "train.parquet", "owner/name: train.parquet"),
        (None, "x.csv", "x.csv"),
    ],
)
def test_errors_name_the_file_that_the_user_knows(source, name, shown):
    assert known_as(name, source) == shown


def test_bad_rows_are_counted_as_the_user_counts_them(tmp_path):
    """A conversation is one row, however many messages it has; each data set has its own share."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    bad = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": 5}]
    write_jsonl(tmp_path / "x/mine.jsonl", [{"messages": turns * 2}, {"messages": bad * 2}])
    write_jsonl(tmp_path / "y/other.jsonl", [{"messages": turns}] * 98)
    sources = ["file:data/local/mine.jsonl", "file:data/local/other.jsonl"]
    tables = [read_messages(tmp_path / name, i, source=sources[i]) for i, name in enumerate("xy")]
    messages = pd.concat(tables, ignore_index=True)
    with pytest.raises(StageError) as caught:
        check_bad_rows(messages, 0.4, sources)
    assert str(caught.value).startswith(
        "file:data/local/mine.jsonl: 1 of 2 rows cannot be used, more than max_bad_rows, 0.4. "
        "The first: data/local/mine.jsonl line 2: "
    )
    check_bad_rows(messages, 0.5, sources)
    assert messages.groupby("dataset")["row"].nunique().tolist() == [2, 98]
