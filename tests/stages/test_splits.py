"""Which conversations are held out, and how often the others are trained on."""

import pandas as pd
import pytest

from stages.conversations.files import split_of
from stages.conversations.splits import held_out
from tests.support.conversations import check_funnel, frame, run, two_datasets
from tests.support.rows import message


def test_split_does_not_move_when_other_trees_come():
    names = [f"tree{i}" for i in range(1000)]
    chosen = [name for name in names if held_out(name, 0.15, 42)]
    assert 110 < len(chosen) < 190
    assert set(chosen) <= {name for name in names if held_out(name, 0.2, 42)}
    assert chosen != [name for name in names if held_out(name, 0.15, 43)]


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
