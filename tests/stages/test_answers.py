"""Answers beside those of the data: whether they end, how long they are, what they repeat; and who judges."""

import pandas as pd
import pytest

from stages.common.answers import answer_figures, ended, reference_of, repeated
from stages.common.halves import choosing, judging

END = 9


def test_an_answer_has_ended_at_an_end_token_only():
    assert ended([1, END], [8, END]) and not ended([END, 1], [END]) and not ended([], [END])


def test_the_reference_is_the_first_answer_with_its_end_cut_as_a_models():
    row = pd.Series({"input_ids": [1, 2, 5, 6, END, 3, 7, END], "assistant_masks": [0, 0, 1, 1, 1, 0, 1, 1]})
    assert reference_of(row, 10) == [5, 6, END]
    assert reference_of(row, 3) == [5, 6, END]
    assert reference_of(row, 2) == [5, 6]
    last = pd.Series({"input_ids": [1, 5, END], "assistant_masks": [0, 1, 1]})
    assert reference_of(last, 10) == [5, END]


def test_a_sequence_is_repeated_where_it_comes_twice_in_one_answer():
    assert repeated([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)
    assert repeated([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0  # in two answers
    assert repeated([[1, 2, 3]]) == 0


def test_figures_of_answers():
    figures = answer_figures([[1, 2, END], [1] * 8], [END])
    assert figures == {"ended": 0.5, "median_tokens": 5.5, "repeated_4grams": 0.8}


@pytest.mark.parametrize("count", [2, 3, 29, 38])
def test_the_halves_are_whole_trees_and_share_none(count):
    trees = [f"tree {i // 2}" for i in range(2 * count)]
    rows = pd.DataFrame({"message_tree_id": trees, "at": range(2 * count)})
    ours, theirs = choosing(rows), judging(rows)
    assert sorted([*ours["at"], *theirs["at"]]) == list(range(2 * count))
    assert set(ours["message_tree_id"]).isdisjoint(theirs["message_tree_id"])
    assert ours["message_tree_id"].nunique() - theirs["message_tree_id"].nunique() in (0, 1)
    assert list(theirs.index) == list(range(len(theirs)))
    shuffled = rows.sample(frac=1, random_state=0)
    assert set(judging(shuffled)["message_tree_id"]) == set(theirs["message_tree_id"])


def test_a_single_tree_chooses_and_judges():
    rows = pd.DataFrame({"message_tree_id": ["a", "a"]})
    assert len(choosing(rows)) == len(judging(rows)) == 2
