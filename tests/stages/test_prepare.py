"""All steps of prepare: conversations as they are written, and a funnel whose counts add up."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.conversations.messages import read_messages
from tests.support.conversations import check_funnel, ids, run, trees_in_both_splits
from tests.support.project import SHARED_OASST1
from tests.support.rows import message

GOLDEN = [
    # The best path follows ranks, not order; it ends on a prompter, who is cut off.
    message("a", role="prompter", text="Question A"),
    message("a.2", "a", rank=1, text="second best"),
    message("a.1", "a", rank=0, text="best"),
    message("a.1.p", "a.1", role="prompter", text="and then?"),
    # A null rank among ranked siblings comes last.
    message("b", role="prompter", text="Question B"),
    message("b.null", "b", text="unranked"),
    message("b.0", "b", rank=3, text="ranked"),
    message("b.0.p", "b.0", role="prompter", text="go on"),
    message("b.0.p.a", "b.0.p", text="going on"),
    # The best answer is deleted, and takes what hangs below it along; another language.
    message("c", role="prompter", text="Frage C", lang="de"),
    message("c.0", "c", rank=0, deleted=True, text="weg", lang="de"),
    message("c.0.p", "c.0", role="prompter", text="unter weg", lang="de"),
    message("c.1", "c", rank=1, text="Antwort", lang="de"),
    # An orphan, a reply in the same role as its parent, an assistant's root, a question without answer.
    message("d.x", "gone", text="orphan"),
    message("e", role="prompter", text="Question E"),
    message("e.p", "e", role="prompter", text="me again"),
    message("f", role="assistant", text="I begin"),
    message("g", role="prompter", text="Question G"),
    # Copies but for case and space; a second row of an id; rows that are none; rejected in review; another state.
    message("h", role="prompter", text="question  a"),
    message("h.a", "h", text="BEST"),
    message("a.1", "a", text="again"),
    message("i", role="moderator"),
    message("j", role="prompter", text=None),
    message("k", role="prompter", review_result=False),
    message("l", role="prompter", tree_state="aborted_low_grade"),
]


def test_golden_funnel():
    conversations, funnel = run(GOLDEN)
    assert ids(conversations, "a") == [["a", "a.1"]]
    assert ids(conversations, "b") == [["b", "b.0", "b.0.p", "b.0.p.a"]]
    assert ids(conversations, "c") == [["c", "c.1"]]
    assert set(conversations["message_tree_id"]) == {"a", "b", "c"}
    assert funnel["read"]["messages"] == len(GOLDEN) == 25
    assert {reason: step["messages"] for reason, step in funnel["dropped"].items()} == {
        "bad_row": 2,  # i, j
        "empty": 0,
        "duplicate_id": 1,  # a.1 again
        "orphan": 1,  # d.x
        "tree_state": 1,  # l
        "deleted": 1,  # c.0
        "rejected_in_review": 1,  # k
        "below_a_dropped_message": 1,  # c.0.p
        "other_split": 0,
        "wrong_role": 2,  # e.p, f
        "below_a_wrong_role": 0,
        "unanswered_question": 3,  # a.1.p, e, g
        "other_thread": 2,  # a.2, b.null
        "beyond_max_turns": 0,
        "below_min_turns": 0,
        "duplicate_conversation": 2,  # h, h.a
        "question_is_held_out": 0,
    }
    assert funnel["dropped"]["duplicate_conversation"]["conversations"] == 1
    assert {reason: step["trees"] for reason, step in funnel["dropped"].items() if step["trees"]} == {
        "bad_row": 2,
        "orphan": 1,
        "tree_state": 1,
        "rejected_in_review": 1,
        "wrong_role": 1,
        "unanswered_question": 2,
        "duplicate_conversation": 1,
    }
    assert sum(s["conversations"] for s in funnel["kept"].values()) == 3
    assert sum(s["by_language"].get("de", {"messages": 0})["messages"] for s in funnel["kept"].values()) == 2
    check_funnel(funnel)


def test_messages_are_as_trl_reads_them():
    conversations, _ = run(GOLDEN, system_prompt="Be kind.")
    b = conversations[conversations["message_tree_id"] == "b"].iloc[0]
    assert b["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Question B"},
        {"role": "assistant", "content": "ranked"},
        {"role": "user", "content": "go on"},
        {"role": "assistant", "content": "going on"},
    ]
    assert list(b["trained"]) == [True, True]
    assert b["lang"] == "en"


@st.composite
def forests(draw):
    """Random message rows: parents among earlier rows or nowhere, any roles, ranks, flags and repeated ids."""
    rows = []
    for i in range(draw(st.integers(1, 30))):
        parent = draw(st.one_of(st.none(), st.integers(0, max(i, 1)).map(lambda n: f"t.{n}")))
        rows.append(
            message(
                f"t.{draw(st.integers(0, 40))}" if draw(st.booleans()) else f"t.{i}",
                parent,
                role=draw(st.sampled_from(["prompter", "assistant", "system", None])),
                text=draw(st.sampled_from(["", " ", "same", f"text {i}", "\0", "\ud800", 5, None])),
                rank=draw(st.one_of(st.none(), st.integers(0, 3), st.just("first"), st.just(10**400))),
                lang=draw(st.sampled_from(["en", "\udfff", 3])),
                labels=draw(st.sampled_from([None, {"name": 1}, {"quality": {"value": "high"}}, ["quality"]])),
                deleted=draw(st.booleans()),
                message_tree_id=f"t{i % 3}",
            )
        )
    return rows + trees_in_both_splits()


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(forests(), st.sampled_from(["best", "all"]))
def test_any_forest_gives_alternating_conversations_and_counts_that_add_up(rows, threads):
    conversations, funnel = run(rows, threads=threads, validation_fraction=0.34)
    check_funnel(funnel)
    json.dumps(funnel, ensure_ascii=False).encode()  # as it is written
    for messages, trained in zip(conversations["messages"], conversations["trained"], strict=True):
        roles = [m["role"] for m in messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert len(trained) == len(roles) // 2 and any(trained)
    by_tree = conversations.groupby("message_tree_id")["split"].nunique()
    assert (by_tree == 1).all()


real = pytest.mark.skipif(not SHARED_OASST1.is_dir(), reason="the real OASST1 rows are not here")


@real
def test_real_oasst1_validation_rows(tmp_path):
    (tmp_path / "x.jsonl").symlink_to(SHARED_OASST1 / "en_validation_first95trees.jsonl")
    conversations, funnel = run(read_messages(tmp_path))
    assert funnel["read"]["messages"] == 1029 and funnel["read"]["trees"] == 95
    assert funnel["dropped"]["orphan"]["trees"] == 2  # their roots are not in the file
    assert len(conversations) == 93
    for messages in conversations["messages"]:
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
    check_funnel(funnel)


@real
def test_real_oasst1_nested_export(tmp_path):
    (tmp_path / "x.jsonl").symlink_to(SHARED_OASST1 / "en_first50trees.trees.jsonl")
    conversations, funnel = run(read_messages(tmp_path), threads="all")
    assert funnel["read"]["trees"] == 50
    assert conversations["message_tree_id"].nunique() == 50
    check_funnel(funnel)
