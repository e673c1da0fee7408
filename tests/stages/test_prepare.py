"""Trees to conversations: threads, filters, splits, and a funnel whose counts add up."""

import gzip
import json

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.common.errors import StageError
from stages.prepare import (
    Funnel,
    check_known,
    find_threads,
    held_out,
    message_row,
    near_duplicates,
    prepare,
    read_messages,
    valid_rows,
)
from tests.support.project import SHARED_OASST1
from tests.support.rows import message, write_jsonl

DEFAULTS = {
    "dataset_weights": None,
    "max_bad_rows": 1.0,
    "threads": "best",
    "tree_states": ["ready_for_export"],
    "languages": [],
    "min_quality": None,
    "max_toxicity": None,
    "allow_synthetic": True,
    "require_review": True,
    "min_turns": 1,
    "max_turns": None,
    "max_similarity": None,
    "validation_fraction": 0.5,
    "split_seed": 0,
    "system_prompt": "",
}


def frame(rows: list[dict], split: str | None = None) -> pd.DataFrame:
    table = pd.DataFrame([message_row(row, split) for row in rows])
    return table.astype({"rank": "Float64", "quality": "Float64", "toxicity": "Float64"}).assign(dataset=0)


def run(rows, **changes):
    """`prepare` over message rows; both splits in one table, and the funnel."""
    messages = rows if isinstance(rows, pd.DataFrame) else frame(rows)
    splits, funnel = prepare(messages, **{**DEFAULTS, **changes})
    return pd.concat([t.assign(split=name) for name, t in splits.items()], ignore_index=True), funnel


def trees_in_both_splits() -> list[dict]:
    """Two plain trees, the first held out by seed 0, the second not, so that neither split is ever empty."""
    names = [next(f"{side}{i}" for i in range(99) if held_out(f"{side}{i}", 0.5, 0) is side) for side in (True, False)]
    return [row for n in names for row in (message(n, role="prompter"), message(f"{n}.a", n))]


def ids(conversations, tree: str) -> list[list[str]]:
    chosen = conversations[conversations["message_tree_id"] == tree]
    return [list(i) for i in chosen["message_ids"]]


def check_funnel(funnel):
    for what in ("messages", "trees", "characters"):
        dropped = sum(step[what] for step in funnel["dropped"].values())
        kept = sum(split[what] for split in funnel["kept"].values())
        assert funnel["read"][what] == dropped + kept, what
    for what in ("messages", "trees"):
        left = funnel["read"][what]
        for step in funnel["dropped"].values():
            left -= step[what]
            assert step[f"{what}_left"] == left
    for step in [funnel["read"], *funnel["dropped"].values(), *funnel["kept"].values()]:
        for what in ("messages", "characters"):
            assert sum(language[what] for language in step["by_language"].values()) == step[what]


# A split that holds tree b out and trains on tree a, and a tree on a's side that will be a copy of it.
SEED = next(seed for seed in range(99) if held_out("b", 0.5, seed) and not held_out("a", 0.5, seed))
COPY = next(name for name in map("h{}".format, range(99)) if not held_out(name, 0.5, SEED))

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
    message(COPY, role="prompter", text="question  a"),
    message(f"{COPY}.a", COPY, text="BEST"),
    message("a.1", "a", text="again"),
    message("i", role="moderator"),
    message("j", role="prompter", text=None),
    message("k", role="prompter", review_result=False),
    message("l", role="prompter", tree_state="aborted_low_grade"),
]


def test_golden_funnel():
    conversations, funnel = run(GOLDEN, split_seed=SEED)
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
    conversations, _ = run(GOLDEN, split_seed=SEED, system_prompt="Be kind.")
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


def test_all_threads_train_shared_beginnings_once():
    rows = [
        message("a", role="prompter"),
        message("a.1", "a", rank=0),
        message("a.1.p", "a.1", role="prompter"),
        message("a.1.p.x", "a.1.p", rank=1),
        message("a.1.p.y", "a.1.p", rank=0),
        message("a.1.q", "a.1", role="prompter"),  # a question without answer: no conversation of its own
        message("a.2", "a", rank=1),
    ]
    conversations, funnel = run(rows + trees_in_both_splits(), threads="all")
    chosen = conversations[conversations["message_tree_id"] == "a"]
    assert [(list(i), list(t)) for i, t in zip(chosen["message_ids"], chosen["trained"], strict=True)] == [
        (["a", "a.1", "a.1.p", "a.1.p.y"], [True, True]),
        (["a", "a.1", "a.1.p", "a.1.p.x"], [False, True]),
        (["a", "a.2"], [True]),
    ]
    check_funnel(funnel)


@pytest.mark.parametrize(
    "changes, row, reason",
    [
        ({"languages": ["de"]}, {}, "language"),
        ({"min_quality": 0.5}, {"labels": {"name": ["spam", "quality"], "value": [0, 0.4]}}, "quality"),
        ({"min_quality": 0.5}, {"labels": {"quality": {"value": 0.4, "count": 3}}}, "quality"),
        ({"max_toxicity": 0.5}, {"detoxify": {"toxicity": 0.6}}, "toxicity"),
        ({"allow_synthetic": False}, {"synthetic": True}, "synthetic"),
        ({}, {"review_result": False}, "rejected_in_review"),
    ],
)
def test_each_filter_drops_what_it_names(changes, row, reason):
    others = [{**other, "lang": "de"} for other in trees_in_both_splits()]
    rows = [message("a", role="prompter"), message("a.1", "a", **row), *others]
    _, funnel = run(rows, **changes)
    assert funnel["dropped"][reason]["messages"] >= 1
    check_funnel(funnel)
    if row:  # without the filter, or without the flag, the answer stays
        conversations, _ = run([*rows[:1], message("a.1", "a"), *others], **{**changes, "languages": []})
        assert ids(conversations, "a") == [["a", "a.1"]]


def test_an_answer_of_a_thread_too_short_to_keep_is_trained_in_a_longer_one():
    rows = [
        message("a", role="prompter"),
        message("a.1", "a"),
        message("a.1.q", "a.1", role="prompter", rank=0),
        message("a.1.p", "a.1", role="prompter", rank=1),
        message("a.1.p.x", "a.1.p"),
    ]
    long = [
        row
        for other in trees_in_both_splits()[::2]
        for row in (
            other,
            message(other["message_id"] + ".a", other["message_id"]),
            message(other["message_id"] + ".p", other["message_id"] + ".a", role="prompter"),
            message(other["message_id"] + ".x", other["message_id"] + ".p"),
        )
    ]
    conversations, _ = run(rows + long, threads="all", min_turns=2)
    chosen = conversations[conversations["message_tree_id"] == "a"]
    assert [list(trained) for trained in chosen["trained"]] == [[True, True]]


@pytest.mark.parametrize(
    "splits, held, dropped",
    [
        (("train", "validation", "test"), "validation", 2),
        (("train", "test"), "test", 0),
        (("train", "validation", None), "validation", 2),
    ],
)
def test_a_published_test_split_is_never_trained_on(splits, held, dropped):
    parts = [
        frame([message(f"{name}", role="prompter"), message(f"{name}.a", f"{name}")], name) for name in map(str, splits)
    ]
    parts = [part.assign(split=None) if name is None else part for name, part in zip(splits, parts, strict=True)]
    conversations, funnel = run(pd.concat(parts, ignore_index=True))
    by_split = conversations.groupby("split")["message_tree_id"].apply(list).to_dict()
    assert by_split == {"train": ["train"], "validation": [held]}
    assert funnel["dropped"].get("other_split", {"messages": 0})["messages"] == dropped
    check_funnel(funnel)


def test_files_with_like_names_do_not_swallow_each_other(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    for part in (1, 2):
        write_jsonl(tmp_path / f"chat.part{part}.jsonl", [{"messages": turns}])
    assert read_messages(tmp_path)["message_id"].nunique() == 4


def test_turn_limits():
    rows = [
        message("a", role="prompter"),
        message("a.1", "a"),
        message("a.2", "a.1", role="prompter"),
        message("a.3", "a.2"),
        *trees_in_both_splits(),
    ]
    cut, funnel = run(rows, max_turns=1)
    assert ids(cut, "a") == [["a", "a.1"]]
    assert funnel["dropped"]["beyond_max_turns"]["messages"] == 2
    with pytest.raises(StageError, match="no conversation is left for"):
        run(rows, min_turns=3)


def test_hub_splits_are_kept_and_a_copy_leaves_the_train_side():
    train = [message("a", role="prompter", text="same"), message("a.1", "a", text="same"), *trees_in_both_splits()]
    held = [message("z", role="prompter", text="Same"), message("z.1", "z", text="SAME")]
    conversations, funnel = run(pd.concat([frame(train, "train"), frame(held, "validation")], ignore_index=True))
    assert list(conversations.loc[conversations["split"] == "validation", "message_tree_id"]) == ["z"]
    assert "a" not in set(conversations["message_tree_id"])
    check_funnel(funnel)


def test_a_held_out_question_is_not_trained_on_with_another_answer():
    train = [message("a", role="prompter", text="Why?"), message("a.1", "a", text="So."), *trees_in_both_splits()]
    held = [message("z", role="prompter", text="WHY?"), message("z.1", "z", text="Because.")]
    conversations, funnel = run(pd.concat([frame(train, "train"), frame(held, "validation")], ignore_index=True))
    assert set(conversations["message_tree_id"]) & {"a", "z"} == {"z"}
    assert funnel["dropped"]["question_is_held_out"]["conversations"] == 1
    check_funnel(funnel)


def test_near_duplicates_by_hand():
    words = [f"w{i}" for i in range(40)]
    texts = [
        " ".join(words),
        " ".join([*words[:39], "other"]),  # shares 37 of 39 triples
        " ".join([*words[:20], *(f"v{i}" for i in range(20))]),  # shares 18 of 58
        "short",
        "short",
    ]
    assert near_duplicates(texts, 0.8) == [False, True, False, False, True]
    assert near_duplicates(texts, 0.15) == [False, True, True, False, True]


def test_near_duplicates_leave_the_train_side_and_are_off_by_default():
    text = " ".join(f"word{i}" for i in range(60))
    train = [
        message("a", role="prompter", text="one"),
        message("a.1", "a", text=text + " end"),
        *trees_in_both_splits(),
    ]
    held = [message("z", role="prompter", text="two"), message("z.1", "z", text=text)]
    both = pd.concat([frame(train, "train"), frame(held, "validation")], ignore_index=True)
    conversations, funnel = run(both, max_similarity=0.8)
    assert set(conversations["message_tree_id"]) & {"a", "z"} == {"z"}
    assert funnel["dropped"]["near_duplicate"]["conversations"] == 1
    check_funnel(funnel)
    assert {"a", "z"} <= set(run(both)[0]["message_tree_id"])


def test_two_data_sets_may_use_the_same_ids_for_other_messages(tmp_path):
    rows = [message("1", role="prompter", text="Q"), message("1.a", "1", text="A")]
    for name in "xy":
        write_jsonl(tmp_path / name / "rows.jsonl", [{**row, "text": f"{row['text']} of {name}"} for row in rows])
    tables = [read_messages(tmp_path / name, number) for number, name in enumerate("xy")]
    assert list(tables[0]["message_id"]) == ["1", "1.a"]  # and so is the first one's split what it is alone
    both = pd.concat(tables, ignore_index=True)
    funnel = Funnel(Funnel.count(both))
    kept = valid_rows(both, funnel)
    assert len(kept) == 4 and funnel.dropped["duplicate_id"]["messages"] == 0
    text = kept.set_index("message_id")["text"]
    threads = [[text[i] for i in ids] for ids in find_threads(kept, "best")]
    assert threads == [["Q of x", "A of x"], ["Q of y", "A of y"]]


def test_known_data_with_other_counts_is_warned_of():
    source = {"source": "OpenAssistant/oasst1", "revision": "fdf72ae0827c1cda404aff25b6603abec9e3399b"}
    assert check_known(source, 88_838, 10_364) is None
    assert "has 88838 messages in 10364 trees, but 5 in 1" in str(check_known(source, 5, 1))
    assert check_known({**source, "revision": "0" * 40}, 5, 1) is None


def test_split_does_not_move_when_other_trees_come():
    names = [f"tree{i}" for i in range(1000)]
    chosen = [name for name in names if held_out(name, 0.15, 42)]
    assert 110 < len(chosen) < 190
    assert set(chosen) <= {name for name in names if held_out(name, 0.2, 42)}
    assert chosen != [name for name in names if held_out(name, 0.15, 43)]


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
        pd.testing.assert_frame_equal(read_messages(tmp_path / form), expected)


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


@settings(max_examples=80, deadline=None)
@given(forests(), st.sampled_from(["best", "all"]))
def test_any_forest_gives_alternating_conversations_and_counts_that_add_up(rows, threads):
    conversations, funnel = run(rows, threads=threads)
    check_funnel(funnel)
    json.dumps(funnel, ensure_ascii=False).encode()  # as it is written
    for messages, trained in zip(conversations["messages"], conversations["trained"], strict=True):
        roles = [m["role"] for m in messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert len(trained) == len(roles) // 2 and any(trained)
    by_tree = conversations.groupby("message_tree_id")["split"].nunique()
    assert (by_tree == 1).all()


def test_cycles_are_orphans():
    rows = [message("a", "a.1", role="prompter"), message("a.1", "a"), *trees_in_both_splits()]
    funnel = Funnel(Funnel.count(frame(rows)))
    assert len(valid_rows(frame(rows), funnel)) == 4
    assert funnel.dropped["orphan"]["messages"] == 2


def test_a_very_deep_tree_does_not_overflow():
    nested = {"message_id": "r0", "text": "x", "role": "prompter", "replies": []}
    top, here = nested, nested
    for i in range(1, 5000):
        reply = {"message_id": f"r{i}", "text": "x", "role": ["prompter", "assistant"][i % 2], "replies": []}
        here["replies"].append(reply)
        here = reply
    from stages.prepare import flatten

    rows = frame(list(flatten({"message_tree_id": "r", "tree_state": "x", "prompt": top}, "x-1")))
    threads = find_threads(rows, "best")
    assert len(threads) == 1 and len(threads[0]) == 5000


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


# Several data sets ------------------------------------------------------------------------------------------------


def two_datasets(count: int) -> pd.DataFrame:
    """`count` trees of a first data set and as many of a second, which brings splits of its own."""
    first, second = ([message(f"{n}{i}", role="prompter") for i in range(count)] for n in "ab")
    answers = [message(f"{row['message_id']}.x", row["message_id"]) for row in [*first, *second]]
    ours = frame(first + answers[:count])
    held_out_rows = frame(second[:2] + answers[count : count + 2], "validation")
    theirs = pd.concat([held_out_rows, frame(second[2:] + answers[count + 2 :], "train")])
    return pd.concat([ours, theirs.assign(dataset=1)], ignore_index=True)


def test_each_data_set_keeps_its_own_splits():
    conversations, funnel = run(two_datasets(20))
    second = conversations[conversations["dataset"] == 1]
    assert sorted(second.loc[second["split"] == "validation", "message_tree_id"]) == ["b0", "b1"]
    first = conversations[conversations["dataset"] == 0]
    assert set(first["split"]) == {"train", "validation"} and len(first) == 20
    for tree, split in zip(first["message_tree_id"], first["split"], strict=True):
        assert (split == "validation") is held_out(tree, 0.5, 0)
    assert funnel["kept"]["validation"]["by_dataset"]["2"] == 2
    check_funnel(funnel)


@pytest.mark.parametrize("weight, expected", [(1.0, 18), (0.5, 9), (2.0, 36), (2.5, 45)])
def test_a_weight_says_how_often_a_data_set_is_used(weight, expected):
    messages = two_datasets(20)
    before, _ = run(messages)
    conversations, funnel = run(messages, dataset_weights=[1.0, weight])
    train = conversations[(conversations["split"] == "train") & (conversations["dataset"] == 1)]
    assert len(train) == expected == funnel["kept"]["train"]["by_dataset"]["2"]
    assert all(list(flags) == [True] for flags in train["trained"])  # each copy is trained on
    times = train["message_tree_id"].value_counts()
    assert times.max() - times.min() <= 1  # all alike, but for the fraction
    # Neither the other data set nor what is held out changes.
    for part in ("split == 'validation'", "dataset == 0"):
        pd.testing.assert_frame_equal(
            before.query(part).reset_index(drop=True), conversations.query(part).reset_index(drop=True)
        )
    check_funnel(funnel)


def test_a_held_out_question_of_one_data_set_is_not_trained_on_from_another():
    messages = two_datasets(20)
    messages.loc[messages["message_id"] == "b5", "text"] = "text of b0"  # b0 is held out, b5 is not
    same = messages["message_id"].isin(["a1"]) if not held_out("a1", 0.5, 0) else messages["message_id"].isin(["a2"])
    messages.loc[same, "text"] = "TEXT  of b1"
    conversations, funnel = run(messages)
    assert funnel["dropped"]["question_is_held_out"]["conversations"] >= 1
    assert "b5" not in set(conversations["message_tree_id"])


def test_a_held_out_question_does_not_come_up_later_in_a_trained_conversation():
    rows = trees_in_both_splits()
    held, trained = rows[0], rows[2]
    rows += [
        message(
            f"{trained['message_id']}.a.p", f"{trained['message_id']}.a", role="prompter", text=held["text"].upper()
        ),
        message(f"{trained['message_id']}.a.p.a", f"{trained['message_id']}.a.p"),
    ]
    other = next(f"o{i}" for i in range(99) if not held_out(f"o{i}", 0.5, 0))
    rows += [message(other, role="prompter"), message(f"{other}.a", other)]
    conversations, funnel = run(rows)
    assert set(conversations["message_tree_id"]) == {held["message_id"], other}
    assert funnel["dropped"]["question_is_held_out"]["conversations"] == 1
