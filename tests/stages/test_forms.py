"""Rows in any form: how each is recognised, and the messages that it becomes."""

import gzip
import json

import datasets
import pandas as pd
import pyarrow as pa
import pytest

from stages.common.errors import StageError
from stages.conversations.forms import FORMS, form_of, unknown_form, unread_columns
from stages.conversations.messages import Counts, message_row, read_messages
from stages.conversations.threads import find_threads
from tests.support.conversations import check_funnel, frame, run
from tests.support.project import ROOT
from tests.support.rows import message, write_jsonl

# A question and its answer in each form.
EXAMPLES = {
    "nested tree": {
        "message_tree_id": "a",
        "prompt": {
            "message_id": "a",
            "role": "prompter",
            "text": "Q",
            "replies": [{"message_id": "a.1", "role": "assistant", "text": "A"}],
        },
    },
    "messages": {"messages": [{"role": "human", "content": "Q"}, {"role": "gpt", "content": "A"}]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "conversation": {"conversation": [{"role": "User", "content": "Q"}, {"role": "Assistant", "content": "A"}]},
    "preference": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "instruction": {"instruction": "Q", "output": "A"},
    "message": message("a", role="prompter", text="Q"),
}


def test_every_form_has_an_example():
    assert set(EXAMPLES) == {form.name for form in FORMS}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_form_is_recognised_and_its_roles_are_user_and_assistant(name):
    form = form_of(EXAMPLES[name])
    assert form.name == name
    messages = [message_row(row, form.roles) for row in form.messages(EXAMPLES[name], "x-1")]
    assert not any(row["bad"] for row in messages)
    expected = [("user", "Q"), ("assistant", "A")][: 1 if name == "message" else 2]
    assert [(row["role"], row["text"]) for row in messages] == expected
    if len(messages) == 2:
        assert messages[1]["parent_id"] == messages[0]["message_id"]


@pytest.mark.parametrize(
    "row, problem",
    [
        (message("a", role="user"), "role is 'user', neither prompter nor assistant"),
        ({"messages": [{"role": "moderator", "content": "4"}]}, "role is 'moderator', neither user nor assistant"),
    ],
)
def test_a_role_that_a_form_does_not_know_is_a_bad_row(row, problem):
    form = form_of(row)
    [bad] = [message_row(found, form.roles, where="x.jsonl line 1") for found in form.messages(row, "x-1")]
    assert bad["bad"] == f"x.jsonl line 1: {problem}"


def test_reads_flat_nested_gzip_and_parquet_alike(tmp_path):
    def rated(quality: float) -> dict:
        return {
            "labels": {"name": ["spam", "quality"], "value": [0.0, quality], "count": [3, 2]},
            "detoxify": {"toxicity": quality / 10, "insult": 0.5},
        }

    flat = [
        message("a", role="prompter", **rated(0.9)),
        message("a.1", "a", rank=1, deleted=True, **rated(0.25)),
        message("a.1.p", "a.1", role="prompter", review_result=False, **rated(0.5)),
        message("a.2", "a", rank=0, synthetic=True, **rated(0.75)),
    ]

    def strip(row):
        labels = {n: {"value": v, "count": c} for n, v, c in zip(*row["labels"].values(), strict=True)}
        rest = {k: v for k, v in row.items() if k not in ("message_tree_id", "tree_state", "labels")}
        return {**rest, "labels": labels}

    nested = {
        "message_tree_id": "a",
        "tree_state": "ready_for_export",
        "prompt": {
            **strip(flat[0]),
            "replies": [{**strip(flat[1]), "replies": [{**strip(flat[2]), "replies": []}]}, strip(flat[3])],
        },
    }
    write_jsonl(tmp_path / "flat/x.jsonl", flat)
    write_jsonl(tmp_path / "nested/x.jsonl", [nested])
    (tmp_path / "gz").mkdir()
    with gzip.open(tmp_path / "gz/x.jsonl.gz", "wt") as file:
        file.write(json.dumps(nested) + "\n")
    (tmp_path / "parquet").mkdir()
    pd.DataFrame(flat).to_parquet(tmp_path / "parquet/x.parquet")
    expected = read_messages(tmp_path / "flat")
    assert list(expected["message_id"]) == ["a", "a.1", "a.1.p", "a.2"]
    assert list(expected["quality"]) == [0.9, 0.25, 0.5, 0.75]
    assert list(expected["toxicity"]) == pytest.approx([0.09, 0.025, 0.05, 0.075])
    assert list(expected["deleted"]) == [False, True, False, False]
    assert list(expected["rank"].isna()) == [True, False, True, False]
    for form in ("nested", "gz", "parquet"):
        found = read_messages(tmp_path / form)  # in a tree, messages share a row
        pd.testing.assert_frame_equal(found.drop(columns="row"), expected.drop(columns="row"))


EXAMPLE_LINES = [
    line for line in (ROOT / "docs/data.md").read_text(encoding="utf-8").splitlines() if line.startswith('{"')
]
TREES = [line for line in EXAMPLE_LINES if line.startswith('{"message_')]
DOCUMENTED = [line for line in EXAMPLE_LINES if line not in TREES]


@pytest.mark.parametrize("line", DOCUMENTED)
def test_every_documented_form_gives_its_conversation(line):
    row = json.loads(line)
    form = form_of(row)
    assert form is not None
    messages = [message_row(found, form.roles) for found in form.messages(row, "x-1")]
    assert [(m["role"], m["text"], m["bad"]) for m in messages] == [("user", "Hi", None), ("assistant", "Yo", None)]
    assert messages[0]["system"] == "Be brief." and not list(unread_columns(row, form))


def test_the_documented_trees_give_their_conversations(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [json.loads(line) for line in TREES])
    counts = Counts()
    table = read_messages(tmp_path, 0, counts)
    assert table["bad"].isna().all() and not counts.notes()
    text = dict(zip(table["message_id"], table["text"], strict=True))
    assert [[text[i] for i in ids] for ids in find_threads(table, "best")] == [["Hi", "Yo"], ["Hi", "Yo"]]


def test_every_form_is_documented():
    documented = {form.name for line in EXAMPLE_LINES if (form := form_of(json.loads(line)))}
    assert documented == {form.name for form in FORMS}


def test_an_unknown_form_names_the_nearest():
    row = {"Question": "Q", "answers": "A"}
    assert form_of(row) is None
    line = unknown_form(row)
    assert "Columns found: Question, answers. Nearest form: instruction (question/answer" in line and "\n" not in line


@pytest.mark.parametrize("value", ["[{'role': 'user', 'content': 'Q'}]", {"role": "user"}, 5])
def test_a_column_of_turns_that_holds_something_else_is_named(value):
    line = unknown_form({"messages": value})
    assert f"missing: none, but messages is {ascii(value)[:40]}, no list of turns and no JSON string of one" in line


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_each_file_type_is_read_from_subfolders(tmp_path, ending, packed):
    rows = [{"question": f"Q{i}", "answer": "A, é\nB"} for i in range(3)]
    if ending == "csv":
        text = pd.DataFrame(rows).to_csv(index=False)
    else:
        text = json.dumps(rows) if ending == "json" else "".join(json.dumps(row) + "\n" for row in rows)
    data = text.encode("utf-8-sig")
    data = gzip.compress(data) if packed == ".gz" else pa.compress(data, "zstd", asbytes=True) if packed else data
    (tmp_path / "part").mkdir()
    (tmp_path / f"part/x.{ending}{packed}").write_bytes(data)
    table = read_messages(tmp_path)
    assert list(table["text"]) == ["Q0", "A, é\nB", "Q1", "A, é\nB", "Q2", "A, é\nB"]
    (tmp_path / f"part/x.{ending}").write_bytes(text.encode("utf-16"))
    with pytest.raises(StageError, match=f"part/x.{ending} is not UTF-8 .*UTF-16"):
        read_messages(tmp_path)


def test_a_table_may_hold_several_forms_whose_other_columns_are_empty(tmp_path):
    rows = [
        {"instruction": "Q0", "output": "A0"},
        {"question": "Q1", "answer": "A1"},
        {"messages": json.dumps([{"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}])},
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "x.csv", index=False)
    pd.DataFrame(rows).to_parquet(tmp_path / "y.parquet")
    table = read_messages(tmp_path)
    assert table["bad"].isna().all() and list(table["text"]) == ["Q0", "A0", "Q1", "A1", "Q2", "A2"] * 2


def test_files_of_one_name_and_other_types_do_not_swallow_each_other(tmp_path):
    for i, ending in enumerate(("json", "jsonl")):
        (tmp_path / f"x.{ending}").write_text(json.dumps({"question": f"Q{i}", "answer": "A"}) + "\n")
    assert list(read_messages(tmp_path)["message_id"]) == ["x.json-1.0", "x.json-1.1", "x.jsonl-1.0", "x.jsonl-1.1"]


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    datasets.Dataset.from_list([{"question": "Q", "answer": "A"}]).save_to_disk(tmp_path / "saved")
    assert list(read_messages(tmp_path)["text"]) == ["Q", "A"]


TURNS = [("system", "be"), ("user", "hi"), ("assistant", "yo"), ("user", "bye")]


@pytest.mark.parametrize(
    "row, messages",
    [
        ({"messages": [{"role": r, "content": c} for r, c in TURNS[1:3]]}, [("system", "default"), *TURNS[1:3]]),
        ({"messages": [{"role": r, "content": c} for r, c in TURNS]}, TURNS[:3]),
        (
            {"instruction": "add", "input": "1, 2", "output": "3"},
            [("system", "default"), ("user", "add\n\n1, 2"), ("assistant", "3")],
        ),
        ({"prompt": "hi", "completion": "yo"}, [("system", "default"), *TURNS[1:3]]),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_peoples_own_forms(tmp_path, row, messages, form):
    def numbered(i: int) -> dict:
        """The row with i in its question, so that no two are alike; enough of them to fill both splits."""
        text = json.dumps(row)
        return json.loads(text.replace('"hi"', f'"hi {i}"').replace('"add"', f'"add {i}"'))

    rows = [numbered(i) for i in range(1, 13)]
    if form == "jsonl":
        write_jsonl(tmp_path / "mine.jsonl", rows)
    else:
        pd.DataFrame(rows).to_parquet(tmp_path / "mine.parquet")
    conversations, funnel = run(read_messages(tmp_path), system_prompt="default")
    assert len(conversations) == 12
    seventh = conversations[conversations["message_tree_id"] == "mine-7"].iloc[0]
    expected = [(r, c.replace("hi", "hi 7").replace("add", "add 7")) for r, c in messages]
    assert [(m["role"], m["content"]) for m in seventh["messages"]] == expected
    check_funnel(funnel)


def test_a_very_deep_tree_does_not_overflow():
    nested = {"message_id": "r0", "text": "x", "role": "prompter", "replies": []}
    top, here = nested, nested
    for i in range(1, 5000):
        reply = {"message_id": f"r{i}", "text": "x", "role": ["prompter", "assistant"][i % 2], "replies": []}
        here["replies"].append(reply)
        here = reply
    row = {"message_tree_id": "r", "tree_state": "x", "prompt": top}
    rows = frame(list(form_of(row).messages(row, "x-1")))
    threads = find_threads(rows, "best")
    assert len(threads) == 1 and len(threads[0]) == 5000
