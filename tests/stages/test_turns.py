"""What a row holds besides text: flags, system turns, runs of a role, greetings; and what is refused by name."""

import pytest

from stages.common.errors import StageError
from stages.conversations.messages import Counts, left_out_notes, read_messages
from tests.support.conversations import check_funnel, run
from tests.support.rows import message, write_jsonl


def rows_of(turns: list, **columns) -> list[dict]:
    """Twelve rows of (role, content, further fields) turns; # stands for the row's number."""
    return [
        {"messages": [{"role": r, "content": c.replace("#", str(i)), **more} for r, c, more in turns], **columns}
        for i in range(12)
    ]


def prepared(tmp_path, rows, **changes):
    write_jsonl(tmp_path / "mine.jsonl", rows)
    conversations, funnel = run(read_messages(tmp_path), **changes)
    check_funnel(funnel)
    first = conversations[conversations["message_tree_id"] == "mine-1"].iloc[0]
    return [(m["role"], m["content"]) for m in first["messages"]], list(first["trained"]), funnel


TALK = [("user", "Q#", {}), ("assistant", "A", {}), ("user", "R", {}), ("assistant", "B", {})]


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss": False}])
def test_an_answer_that_is_not_to_be_trained_is_context(tmp_path, flag):
    talk, trained, _ = prepared(tmp_path, rows_of([TALK[0], ("assistant", "wrong", flag), *TALK[2:]]))
    assert talk == [("user", "Q0"), ("assistant", "wrong"), ("user", "R"), ("assistant", "B")]
    assert trained == [False, True]


def test_leading_system_turns_and_the_rows_own_are_joined(tmp_path):
    turns = [("system", "One.", {}), ("developer", "Two.", {}), *TALK[:2]]
    talk, _, _ = prepared(tmp_path, rows_of(turns, system="Zero."))
    assert talk[0] == ("system", "Zero.\n\nOne.\n\nTwo.")


def test_turns_of_one_role_in_a_row_are_joined(tmp_path):
    talk, trained, _ = prepared(tmp_path, rows_of([TALK[0], ("user", "more", {}), TALK[1], ("assistant", "end", {})]))
    assert talk == [("user", "Q0\n\nmore"), ("assistant", "A\n\nend")] and trained == [True]


def test_a_greeting_is_left_out_and_all_answers_stay(tmp_path):
    talk, trained, funnel = prepared(tmp_path, rows_of([("assistant", "Hello", {}), *TALK]))
    assert [role for role, _ in talk] == ["user", "assistant"] * 2 and trained == [True, True]
    assert funnel["dropped"]["greeting"]["messages"] == 12


def test_a_late_system_turn_keeps_its_place(tmp_path):
    late = [("system", "In French.", {}), ("developer", "Be brief.", {})]
    talk, trained, _ = prepared(tmp_path, rows_of([*TALK[:2], *late, *TALK[2:]]), system_prompt="default")
    assert talk == [
        ("system", "default"),
        ("user", "Q0"),
        ("assistant", "A"),
        ("system", "In French.\n\nBe brief."),
        ("user", "R"),
        ("assistant", "B"),
    ]
    assert trained == [True, True]


def test_a_system_turn_before_an_answer_keeps_its_place(tmp_path):
    talk, _, _ = prepared(tmp_path, rows_of([TALK[0], ("system", "Be brief.", {}), TALK[1]]))
    assert talk == [("user", "Q0"), ("system", "Be brief."), ("assistant", "A")]


def test_a_system_turn_between_turns_of_one_role_refuses_its_row(tmp_path):
    odd = rows_of([TALK[0], ("system", "In French.", {}), ("user", "odd #", {}), TALK[1]])[:1]
    plain = rows_of([("user", "other #", {}), TALK[1]])
    _, _, funnel = prepared(tmp_path, [*plain, *odd])
    assert funnel["dropped"]["late_system"]["messages"] == funnel["dropped"]["late_system"]["trees"] == 1
    table = read_messages(tmp_path)
    [why] = table["why"].dropna()
    assert why == "mine.jsonl line 13: a system turn stands between two turns of the user in a row"
    assert left_out_notes(table) == [f"1 rows are left out (late_system). The first: {why}"]


def test_a_system_turn_at_the_end_is_left_out_and_counted(tmp_path):
    talk, _, funnel = prepared(tmp_path, rows_of([*TALK[:2], ("system", "In French.", {})]))
    assert talk == [("user", "Q0"), ("assistant", "A")]
    assert funnel["dropped"]["system_at_end"]["messages"] == 12
    [note] = left_out_notes(read_messages(tmp_path))
    assert note == "12 conversations end with a system message; it is left out (system_at_end)"


def test_the_system_turn_before_a_greeting_holds_for_the_conversation(tmp_path):
    turns = [("system", "One.", {}), ("assistant", "Hello", {}), ("assistant", "Well?", {}), ("system", "Two.", {})]
    talk, _, funnel = prepared(tmp_path, rows_of([*turns, *TALK[:2]]))
    assert talk == [("system", "One.\n\nTwo."), ("user", "Q0"), ("assistant", "A")]
    assert funnel["dropped"]["greeting"]["messages"] == 24
    [note] = left_out_notes(read_messages(tmp_path))
    assert note == "12 conversations begin with an answer; it is left out (greeting)"


def test_conversations_with_other_system_messages_are_no_copies(tmp_path):
    rows = [row for name in ("One.", "Two.") for row in rows_of(TALK, system=name)]
    write_jsonl(tmp_path / "train.jsonl", [*rows, *rows_of(TALK, system="ONE.")])
    write_jsonl(tmp_path / "validation.jsonl", rows_of([("user", "held out #", {}), TALK[1]]))
    conversations, funnel = run(read_messages(tmp_path))
    assert (conversations["split"] == "train").sum() == 24
    assert funnel["dropped"]["duplicate_conversation"]["conversations"] == 12


def test_flags_and_more_than_text_hold_for_messages_of_trees_too(tmp_path):
    flat = [message("a", role="prompter"), message("a.1", "a", weight=0), message("b", role="prompter")]
    tree = {"message_id": "c", "role": "prompter", "text": "Q"}
    reply = {"message_id": "c.1", "role": "assistant", "text": "A", "train": False, "mood": "good"}
    nested = {"message_tree_id": "c", "prompt": {**tree, "replies": [reply]}, "origin": "web"}
    write_jsonl(tmp_path / "mine.jsonl", [*flat, nested, message("b.1", "b", tool_calls=[{"id": "x"}])])
    counts = Counts()
    table = read_messages(tmp_path, 0, counts)
    assert dict(zip(table["message_id"], table["trained"], strict=True)) == {
        **{"a": True, "a.1": False, "b": True, "c": True, "c.1": False},
        "mine-5.0": True,
    }
    assert list(table["why"].dropna()) == ["mine.jsonl line 5: tool calls (`tool_calls`) cannot be trained on"]
    assert set(counts.notes()[0].removeprefix("columns that are not read: ").split(", ")) == {
        "mood (1 rows)",
        "origin (1 rows)",
    }


@pytest.mark.parametrize(
    "extra, words",
    [
        ({"turn": ("assistant", "x", {"tool_calls": [{"id": "c"}]})}, r"tool calls \(`tool_calls` of turn 2\)"),
        ({"turn": ("tool", "16", {})}, r"role `tool` of turn 2"),
        ({"turn": ("assistant", "x", {"reasoning_content": "hm"})}, r"reasoning \(`reasoning_content` of turn 2\)"),
        ({"turn": ("assistant", "x", {"weight": 0.5})}, r"`weight` of turn 2 is 0.5"),
        ({"row": {"tools": [{"name": "f"}]}}, r"tools \(`tools`\)"),
        ({"row": {"images": ["a.png"]}}, r"images \(`images`\)"),
    ],
)
def test_what_is_more_than_text_is_refused_by_name_or_skipped(tmp_path, extra, words):
    odd = rows_of([("user", "odd", {}), extra.get("turn", TALK[1])], **extra.get("row", {}))[:1]
    write_jsonl(tmp_path / "mine.jsonl", [*rows_of(TALK), *odd])
    with pytest.raises(StageError, match=rf"mine.jsonl line 13: .*{words}.*unsupported_rows: skip"):
        run(read_messages(tmp_path))
    _, funnel = run(read_messages(tmp_path), unsupported_rows="skip")
    assert funnel["dropped"]["unsupported"]["messages"] == 1
    check_funnel(funnel)


def test_columns_that_are_not_read_are_listed_once(tmp_path):
    write_jsonl(tmp_path / "mine.jsonl", rows_of([("user", "Q#", {"name": "Ann"}), TALK[1]], source="web", lang="en"))
    counts = Counts()
    read_messages(tmp_path, 0, counts)
    [note] = counts.notes()
    assert note.startswith("columns that are not read: ")
    assert "source (12 rows)" in note and "messages.name (12 rows)" in note and "lang" not in note
