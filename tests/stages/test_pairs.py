"""Questions and answers in columns of their own: nothing of a row is lost without a line."""

import csv
import json

import pytest

from stages.common.errors import StageError
from stages.conversations.forms import form_of, unread_columns
from stages.conversations.messages import message_row, read_messages
from stages.conversations.turns import RefusedRow
from tests.support.conversations import run
from tests.support.rows import write_jsonl


def turn(role: str, content: str, **flags) -> dict:
    return {"role": role, "content": content, **flags}


def talk_of(row: dict) -> tuple[list[str], set[str]]:
    """What a row says, each system message in brackets before its turn, and the columns that it is not read from."""
    form = form_of(row)
    assert form is not None
    messages = [message_row(found, form.roles) for found in form.messages(row, "x-1")]
    assert not any(message["bad"] for message in messages)
    assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
    said = [f"[{m['system']}] {m['text']}" if m["system"] else m["text"] for m in messages]
    return said, set(unread_columns(row, form))


ASKED = {"input": "C", "history": [["Q0", "A0"]], "system": "S"}


@pytest.mark.parametrize("question", ["instruction", "prompt", "question"])
@pytest.mark.parametrize("answer", [{"chosen": "A"}, {"chosen": [turn("assistant", "A")]}, {"output": "A"}])
def test_instructions_and_preferences_read_history_and_context_alike(question, answer):
    said, unread = talk_of({question: "Q", **answer, **ASKED})
    assert said == ["[S] Q0", "A0", "Q\n\nC", "A"] and not unread


@pytest.mark.parametrize(
    "row, said, unread",
    [
        ({"instruction": "I", "question": "Q", "answer": "A"}, ["Q", "A"], {"instruction"}),
        ({"prompt": "P", "instruction": "I", "response": "A"}, ["I", "A"], {"prompt"}),
        ({"instruction": "I", "output": "A", "response": "B"}, ["I", "B"], {"output"}),
        ({"prompt": "P", "instruction": "I", "chosen": "A"}, ["P", "A"], {"instruction"}),
        ({"prompt": "P", "chosen": "A", "response": "B", "label": True}, ["P", "A"], {"response", "label"}),
        ({"instruction": "I", "output": "A", "rejected": "B"}, ["I", "A"], {"rejected"}),
        ({"instruction": "I", "output": "A", "context": ["C"]}, ["I", "A"], {"context"}),
        ({"prompt": [turn("user", "P")], "completion": "A", "context": "C"}, ["P", "A"], {"context"}),
        ({"chosen": [turn("user", "Q"), turn("assistant", "A")], "history": [["x", "y"]]}, ["Q", "A"], {"history"}),
        ({"messages": [turn("user", "Q"), turn("assistant", "A")], "chosen": "B"}, ["Q", "A"], {"chosen"}),
        ({"messages": [turn("user", "Q")], "chosen": "A", "response": "B"}, ["Q", "A"], {"response"}),
        ({"instruction": "I", "input": "", "question": None, "output": "A"}, ["I", "A"], set()),
    ],
)
def test_a_column_that_a_row_is_not_read_from_is_listed(row, said, unread):
    assert talk_of(row) == (said, unread)


CHOSEN = [{"from": "gpt", "value": "A"}, turn("assistant", "A"), [turn("assistant", "A")], "A"]


@pytest.mark.parametrize("chosen", [*CHOSEN, *map(json.dumps, CHOSEN[:3])], ids=str)
@pytest.mark.parametrize("column", ["chosen", "completion", "response"])
def test_the_answer_beside_a_list_of_turns_is_its_last_turn(column, chosen):
    listed = [turn("user", "Q0"), turn("assistant", "A0"), turn("user", "Q")]
    row = {"messages": listed, column: chosen, **({"rejected": "B"} if column == "chosen" else {})}
    assert talk_of(row) == (["Q0", "A0", "Q", "A"], set())
    assert talk_of({**row, "messages": json.dumps(listed)}) == (["Q0", "A0", "Q", "A"], set())


def test_a_field_of_an_answer_that_is_not_read_is_listed():
    answer = {**turn("assistant", "A"), "mood": "good"}
    assert talk_of({"messages": [turn("user", "Q")], "chosen": answer}) == (["Q", "A"], {"chosen.mood"})


S, Q0, A0, Q, A = turn("system", "S"), turn("user", "Q0"), turn("assistant", "A0"), turn("user", "Q"), "A"
WHOLE = [Q0, A0, Q, turn("assistant", "A")]


@pytest.mark.parametrize(
    "prompt, chosen, said, unread",
    [
        ([S, Q], WHOLE[2:], ["[S] Q", "A"], set()),
        ([S, Q], [turn("system", "T"), *WHOLE[2:]], ["[S\n\nT] Q", "A"], set()),
        ([S, Q], [S, *WHOLE[2:]], ["[S] Q", "A"], set()),
        ([Q], [S, *WHOLE[2:]], ["[S] Q", "A"], set()),
        ([S, Q0, A0, Q], WHOLE, ["[S] Q0", "A0", "Q", "A"], set()),
        ([Q0, A0, S, Q], WHOLE, ["Q0", "A0", "[S] Q", "A"], set()),
        ([Q0, A0, Q], WHOLE[2:], ["Q0", "A0", "Q", "A"], set()),
        ([Q, S], WHOLE[2:], ["Q", "[S] A"], set()),
        ("Q0", WHOLE, ["Q0", "A0", "Q", "A"], set()),
        (" Q\n", WHOLE, ["Q0", "A0", "Q", "A"], set()),
        ([S, turn("user", "other")], WHOLE, ["[S] Q0", "A0", "Q", "A"], {"prompt"}),
        ("Human: Q0", WHOLE, ["Q0", "A0", "Q", "A"], {"prompt"}),
    ],
)
@pytest.mark.parametrize("column", ["chosen", "completion"])
def test_an_answer_may_repeat_its_prompt(prompt, chosen, said, unread, column):
    assert talk_of({"prompt": prompt, column: chosen}) == (said, unread)


def test_the_context_of_a_prompt_that_the_answer_repeats_is_kept_or_listed():
    row = {"instruction": "Q", "input": "C"}
    assert talk_of({**row, "chosen": WHOLE[2:]}) == (["Q", "A"], {"input"})
    assert talk_of({**row, "chosen": [turn("user", "Q\n\nC"), WHOLE[3]]}) == (["Q\n\nC", "A"], set())


def test_a_repeated_answer_that_is_not_to_be_trained_stays_context():
    row = {"prompt": [Q0, turn("assistant", "A0", weight=0), Q], "chosen": WHOLE}
    assert [message["trained"] for message in form_of(row).messages(row, "x")][1::2] == [False, True]


def test_both_system_columns_are_joined():
    row = {"question": "Q", "answer": "A", "system": "S1", "system_prompt": "S2"}
    assert talk_of(row) == (["[S1\n\nS2] Q", "A"], set())
    assert talk_of({**row, "system_prompt": "S1"}) == (["[S1] Q", "A"], set())


LABELS = [(False, False), ("False", False), ("false", False), (0, False), ("0", False), (0.0, False), (True, True)]


@pytest.mark.parametrize("label, trained", [*LABELS, ("True", True), (1, True), (None, True)])
@pytest.mark.parametrize("question", [{"prompt": "Q"}, {"messages": [Q]}])
def test_a_label_rejects_a_completion_however_it_is_spelled(question, label, trained):
    row = {**question, "completion": "A", "label": label}
    assert [message["trained"] for message in form_of(row).messages(row, "x")][1::2] == [trained]
    assert not list(unread_columns(row, form_of(row)))


def test_a_rejected_completion_in_csv_is_not_trained_on(tmp_path):
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["prompt", "completion", "label"], ["Q1", "good", "True"], ["Q2", "bad", "False"], ["Q3", "good", ""]]
        )
    assert read_messages(tmp_path)["trained"].tolist()[1::2] == [True, False, True]


@pytest.mark.parametrize("label", ["positive", 2, 0.5])
def test_another_label_is_refused_by_name(tmp_path, label):
    row = {"prompt": "Q", "completion": "A", "label": label}
    with pytest.raises(RefusedRow, match=f"`label` is {label!r}"):
        list(form_of(row).messages(row, "x"))
    write_jsonl(tmp_path / "x.jsonl", [row])
    with pytest.raises(StageError, match="x.jsonl line 1: `label` is"):
        run(read_messages(tmp_path))
