"""Flags, numbers and scores of a row, in the spelling of JSON and of CSV; what is none of them is a bad row."""

import csv
import json

import pytest

from stages.conversations.messages import message_row, read_messages
from tests.support.rows import message, write_jsonl

FIELDS = {
    "deleted": True,
    "synthetic": True,
    "review_result": False,
    "rank": 2,
    "labels": {"quality": {"value": 0.75, "count": 1}},
    "detoxify": {"toxicity": 0.25},
}
READ = {"deleted": True, "synthetic": True, "review_result": False, "rank": 2.0, "quality": 0.75, "toxicity": 0.25}


@pytest.mark.parametrize("spell", [json.dumps, str], ids=["JSON", "Python"])
def test_csv_says_what_jsonl_says(tmp_path, spell):
    texts = {name: spell(value) if not isinstance(value, dict) else json.dumps(value) for name, value in FIELDS.items()}
    rows = [message("a", role="prompter"), message("a.1", "a", **texts)]
    with (tmp_path / "x.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    table = read_messages(tmp_path)
    assert table["bad"].isna().all()
    assert {name: table[name][1] for name in READ} == READ
    assert table["deleted"].tolist() == [False, True] and table["rank"].isna().tolist() == [True, False]


@pytest.mark.parametrize("value", ["True", "true", " TRUE ", "1", 1, 1.0, True])
def test_a_flag_holds_however_it_is_spelled(tmp_path, value):
    write_jsonl(tmp_path / "x.jsonl", [{"instruction": "Q", "output": "A", "deleted": value, "synthetic": "False"}])
    table = read_messages(tmp_path)
    assert table["deleted"].tolist() == [True, True] and table["synthetic"].tolist() == [False, False]


@pytest.mark.parametrize("value", [None, "", " ", "null", float("nan")])
def test_a_missing_value_is_unknown(value):
    row = message_row(message("a", role="prompter", **dict.fromkeys(FIELDS, value)))
    found = {name: row[name] for name in READ}
    assert found == {**dict.fromkeys(READ), "deleted": False, "synthetic": False} and row["bad"] is None


@pytest.mark.parametrize("labels", [{"quality": 0.5}, '{"name": ["spam", "quality"], "value": [0, "0.5"]}'])
def test_a_quality_is_read_from_each_form_of_labels(labels):
    assert message_row(message("a", role="prompter", labels=labels))["quality"] == 0.5


@pytest.mark.parametrize(
    "name, value, problem",
    [
        ("deleted", "maybe", "deleted is 'maybe', neither true nor false"),
        ("synthetic", 0.5, "synthetic is 0.5, neither true nor false"),
        ("review_result", [True], "review_result is [True], neither true nor false"),
        ("rank", "first", "rank is 'first', not a number"),
        ("rank", True, "rank is True, not a number"),
        ("labels", "{'quality': 1}", "labels is \"{'quality': 1}\", not an object of JSON"),
        ("labels", ["spam"], "labels is ['spam'], not an object of JSON"),
        ("labels", {"quality": "x"}, "labels is {'quality': 'x'}, of which quality is not a number"),
        ("detoxify", "0.3", "detoxify is '0.3', not an object of JSON"),
        ("detoxify", {"toxicity": [1]}, "detoxify is {'toxicity': [1]}, of which toxicity is not a number"),
    ],
)
def test_a_value_that_cannot_be_read_is_a_bad_row(name, value, problem):
    assert message_row(message("a", role="prompter", **{name: value}))["bad"] == f"a row: {problem}"
