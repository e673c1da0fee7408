"""Which conversations are held out, and how often the others are trained on."""

import json
from pathlib import Path

import pandas as pd
import pytest

from stages.common.errors import StageError
from stages.conversations.files import split_of
from stages.conversations.messages import read_messages
from stages.conversations.splits import settled_splits
from stages.prepare import split_notes
from tests.support.conversations import check_funnel, frame, run, two_datasets
from tests.support.rows import message


def plain(names, **fields) -> list[dict]:
    """A tree of one question and one answer for each name."""
    pairs = ((message(f"{n}", role="prompter", **fields), message(f"{n}.a", f"{n}", **fields)) for n in names)
    return [row for pair in pairs for row in pair]


def held_of(conversations: pd.DataFrame) -> set[str]:
    return set(conversations.loc[conversations["split"] == "validation", "message_tree_id"])


@pytest.mark.parametrize(
    "count, fraction, expected",
    [(60, 0.15, 9), (30, 0.15, 5), (200, 0.15, 30), (10, 0.1, 1), (3, 0.34, 1), (2, 0.01, 1), (5, 0.01, 1)],
)
@pytest.mark.parametrize("seed", [0, 42])
def test_the_held_out_share_is_what_was_asked(count, fraction, expected, seed):
    conversations, funnel = run(plain(range(count)), validation_fraction=fraction, split_seed=seed)
    assert len(held_of(conversations)) == expected == funnel["kept"]["validation"]["trees"]
    assert len(conversations) == count
    check_funnel(funnel)


def test_few_trees_move_when_others_come_and_none_when_files_are_renamed_or_rows_inserted():
    before = held_of(run(plain(f"tree{i}" for i in range(100)), validation_fraction=0.15)[0])
    assert before != held_of(run(plain(f"tree{i}" for i in range(100)), validation_fraction=0.15, split_seed=1)[0])
    more = held_of(run(plain(f"tree{i}" for i in range(110)), validation_fraction=0.15)[0])
    assert len(before) == 15 and len(more) == 17 and len(before - more) <= 2
    rows = plain(f"tree{i}" for i in range(100))
    for row in rows:  # texts stay
        for name in ("message_id", "parent_id", "message_tree_id"):
            row[name] = row[name] and f"renamed-{row[name]}"
    assert {name.removeprefix("renamed-") for name in held_of(run(rows, validation_fraction=0.15)[0])} == before


def test_copies_and_trees_with_the_same_question_stay_on_one_side_and_the_share_is_right():
    rows = plain(range(60))
    for i in range(60, 70):  # copies of ten trees
        rows += [
            message(f"{i}", role="prompter", text=f"TEXT of  {i - 60}"),
            message(f"{i}.a", f"{i}", text=f"text of {i - 60}.a"),
        ]
    for i in range(70, 80):  # ten trees with a question of another one, and another answer
        rows += [message(f"{i}", role="prompter", text=f"text of {i - 60}"), message(f"{i}.a", f"{i}")]
    conversations, funnel = run(rows, validation_fraction=0.2)
    assert len(conversations) == 70 and len(held_of(conversations)) == 14
    assert funnel["dropped"]["question_is_held_out"]["conversations"] == 0
    assert funnel["dropped"]["duplicate_conversation"]["conversations"] == 10
    side = conversations.set_index("message_tree_id")["split"]
    assert all(side[f"{i}"] == side[f"{i - 60}"] for i in range(70, 80))


def test_two_questions_with_many_answers_are_parted():
    rows = [
        row
        for i in range(40)
        for row in (message(f"{i}", role="prompter", text=f"Q{i % 4 > 0}"), message(f"{i}.a", f"{i}"))
    ]
    conversations, _ = run(rows, validation_fraction=0.1)
    assert len(held_of(conversations)) == 10  # the nearest that there is


@pytest.mark.parametrize(
    "rows, changes, said",
    [
        (plain("a"), {}, r"left for validation: of 1 trees, 1 passed all steps. One must be trained on and another"),
        (
            plain("ab"),
            {"languages": ["de"]},
            r"Of 4 messages, 4 in en were dropped as `language`. Change languages in params.yaml.$",
        ),
        (plain("ab"), {"min_turns": 2}, r"of 2 trees, 0 passed .* as `below_min_turns`. Change min_turns in"),
        ([message("a"), message("b")], {}, r"2 were dropped as `wrong_role`. docs/data.md explains `wrong_role`.$"),
        (
            [*plain("ab", lang="de"), *plain("cd", deleted=True)],
            {"languages": ["en"]},
            r"of 4 trees, 0 passed all steps. Of 8 messages, 4 were dropped as `deleted` and 4 in de were "
            "dropped as `language`. docs/data.md explains `deleted`. Change languages in params.yaml.$",
        ),
    ],
)
def test_what_left_a_split_empty_is_named(rows, changes, said):
    with pytest.raises(StageError, match=said):
        run(rows, **changes)


@pytest.mark.parametrize(
    "splits, held, dropped",
    [
        (("train", "validation", "test"), "validation", 2),
        (("train", "test"), "test", 0),
        (("train", "validation", None), "validation", 2),
        (("train", "test", None), "test", 2),
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


def test_each_data_set_keeps_its_own_splits():
    conversations, funnel = run(two_datasets(20))
    second = conversations[conversations["dataset"] == 1]
    assert sorted(second.loc[second["split"] == "validation", "message_tree_id"]) == ["b0", "b1"]
    first = conversations[conversations["dataset"] == 0]
    assert set(first["split"]) == {"train", "validation"} and len(first) == 20
    assert (first["split"] == "validation").sum() == 10
    assert funnel["kept"]["validation"]["by_dataset"]["2"] == 2
    check_funnel(funnel)


LISTS = [  # what the files of each data set of a list state -> what becomes of them
    ("train + validation", ["train"], ["validation"]),
    ("train + test", ["train"], ["validation"]),
    ("train + validation + test", ["train"], ["validation"], ["other"]),
    ("mine + test", ["train"], ["validation"]),
    ("mine + validation + train", ["train"], ["validation"], ["train"]),
    ("mine + train", [None], [None]),
    ("validation + test", [None], ["other"]),
    ("train/validation + mine", ["train", "validation"], [None]),
    ("train/validation + test + mine", ["train", "validation"], ["other"], [None]),
    ("train/validation + validation + mine", ["train", "validation"], ["validation"], ["train"]),
    ("train/test + train/validation", [None, "other"], ["train", "validation"]),
    ("train/validation/mine", ["train", "validation", "other"]),
    ("mine/validation", ["train", "validation"]),
]


@pytest.mark.parametrize("stated, expected", [(stated, expected) for stated, *expected in LISTS])
def test_a_list_of_files_honours_their_names(stated, expected):
    names = [each.split("/") for each in stated.split(" + ")]
    parts = [frame([message("a")], split_of(name)).assign(dataset=i) for i, each in enumerate(names) for name in each]
    fates = settled_splits(pd.concat(parts, ignore_index=True))
    assert [[fates[i][split_of(name)] for name in each] for i, each in enumerate(names)] == expected


def test_each_file_of_a_list_goes_where_its_name_says(tmp_path):
    names = ["my_train.jsonl", "part/valid.json", "test.jsonl", "more.csv"]
    for i, name in enumerate(names):
        folder = (tmp_path / f"{i + 1}" / name).parent
        folder.mkdir(parents=True)
        text = (
            f"question,answer\nQ{i},A\n" if name.endswith("csv") else json.dumps({"question": f"Q{i}", "answer": "A"})
        )
        (folder / Path(name).name).write_text(text)
    messages = pd.concat([read_messages(tmp_path / f"{i + 1}", i) for i in range(4)], ignore_index=True)
    assert split_notes(messages, [tmp_path / f"{i + 1}" for i in range(4)]) == [
        "trained on: my_train.jsonl",
        "held out: part/valid.json",
        "left out: test.jsonl",
        "trained on: more.csv",
    ]
    conversations, funnel = run(messages)
    assert dict(zip(conversations["dataset"], conversations["split"], strict=True)) == {
        0: "train",
        1: "validation",
        3: "train",
    }
    check_funnel(funnel)
    assert split_notes(messages[messages["dataset"] == 3], []) == []  # no name states a split: nothing to say


def test_a_test_split_alone_is_an_error_that_says_so():
    with pytest.raises(StageError, match="names of all data files state a test split, which is never trained on"):
        run(frame([message("a", role="prompter"), message("a.1", "a")], "test"))


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


@pytest.mark.parametrize(
    "name, split",
    [
        ("train-00000-of-00001.parquet", "train"),
        ("valid/x.jsonl", "validation"),
        ("my_dev.csv", "validation"),
        ("data.test1.jsonl", "test"),
        ("testimonials.jsonl", None),
        ("training.jsonl", None),
        ("test/evaluation.jsonl", "test"),
    ],
)
def test_a_split_is_a_word_of_its_own(name, split):
    assert split_of(name) == split


def test_a_lone_test_split_is_held_out_of_unnamed_files():
    parts = [
        frame([message(n, role="prompter"), message(f"{n}.a", n)], n if n == "test" else None) for n in ("x", "test")
    ]
    conversations, funnel = run(pd.concat(parts, ignore_index=True))
    assert conversations.groupby("split")["message_tree_id"].apply(list).to_dict() == {
        "train": ["x"],
        "validation": ["test"],
    }
    check_funnel(funnel)
