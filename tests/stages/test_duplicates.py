"""Copies, near copies and held-out questions leave the training split."""

import pandas as pd

from stages.conversations.duplicates import near_duplicates
from stages.conversations.held_out import by_hash
from stages.prepare import leak_note
from tests.support.conversations import check_funnel, frame, run, trees_in_both_splits, two_datasets
from tests.support.rows import message


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


def test_a_leak_is_reported_with_its_number_copies_included():
    train = [message("a", role="prompter", text="Why?"), message("a.1", "a", text="So."), *trees_in_both_splits()]
    train += [message("b", role="prompter", text="why? "), message("b.1", "b", text="because.")]
    held = [message("z", role="prompter", text="WHY?"), message("z.1", "z", text="Because.")]
    _, funnel = run(pd.concat([frame(train, "train"), frame(held, "validation")], ignore_index=True))
    assert str(leak_note(funnel)).startswith("prepare: 2 conversations to train on ask a held-out question")
    assert funnel["dropped"]["duplicate_conversation"]["conversations"] == 0
    assert leak_note(run(trees_in_both_splits())[1]) is None


def test_a_held_out_question_does_not_come_up_later_in_a_trained_conversation():
    rows = trees_in_both_splits()
    held, trained = rows[0], rows[2]
    rows += [
        message(
            f"{trained['message_id']}.a.p", f"{trained['message_id']}.a", role="prompter", text=held["text"].upper()
        ),
        message(f"{trained['message_id']}.a.p.a", f"{trained['message_id']}.a.p"),
    ]
    # A third tree, which comes after the held-out one.
    other = next(f"o{i}" for i in range(99) if by_hash([f"text of o{i}", held["text"]], 0)[0] == held["text"])
    rows += [message(other, role="prompter"), message(f"{other}.a", other)]
    conversations, funnel = run(rows, validation_fraction=0.34)
    assert set(conversations["message_tree_id"]) == {held["message_id"], other}
    assert funnel["dropped"]["question_is_held_out"]["conversations"] == 1


def test_a_held_out_question_of_one_data_set_is_not_trained_on_from_another():
    messages = two_datasets(20)
    messages.loc[messages["message_id"] == "b5", "text"] = "text of b0"  # b0 is held out, b5 is not
    messages.loc[messages["message_id"] == "a1", "text"] = "TEXT  of b1"
    texts = ["text of b1", *(f"text of a{i}" for i in range(20) if i != 1)]
    seed = next(
        seed for seed in range(99) if by_hash(texts, seed)[-1] == "text of b1"
    )  # of its own data set, a1 is not
    conversations, funnel = run(messages, split_seed=seed)
    assert funnel["dropped"]["question_is_held_out"]["conversations"] == 2
    assert not {"a1", "b5"} & set(conversations["message_tree_id"])
