"""Filters: each drops what it names, and the funnel counts it."""

import re

import pytest

from stages.common.errors import StageError
from stages.conversations.filters import FILTERS, VALID, keep_messages
from stages.conversations.left_out import PARAMETERS
from stages.conversations.selection import Selection
from tests.support.conversations import check_funnel, frame, ids, params, run, trees_in_both_splits
from tests.support.project import ROOT
from tests.support.rows import message

# Parameters, what is special about an answer, and the reason for which it is dropped.
CASES = [
    ({}, {"tree_state": "aborted_low_grade"}, "tree_state"),
    ({}, {"deleted": True}, "deleted"),
    ({}, {"review_result": False}, "rejected_in_review"),
    ({"allow_synthetic": False}, {"synthetic": True}, "synthetic"),
    ({"languages": ["de"]}, {}, "language"),
    ({"min_quality": 0.5}, {"labels": {"name": ["spam", "quality"], "value": [0, 0.4]}}, "quality"),
    ({"min_quality": 0.5}, {"labels": {"quality": {"value": 0.4, "count": 3}}}, "quality"),
    ({"max_toxicity": 0.5}, {"detoxify": {"toxicity": 0.6}}, "toxicity"),
]


def test_every_filter_has_a_case():
    assert {reason for _, _, reason in CASES} == {reason for reason, *_ in FILTERS} - {"below_a_dropped_message"}


@pytest.mark.parametrize("changes, row, reason", CASES)
def test_each_filter_drops_what_it_names(changes, row, reason):
    others = [{**other, "lang": "de"} for other in trees_in_both_splits()]
    rows = [message("a", role="prompter"), message("a.1", "a", **row), *others]
    _, funnel = run(rows, **changes)
    assert funnel["dropped"][reason]["messages"] >= 1
    check_funnel(funnel)
    if row:  # without the filter, or without the flag, the answer stays
        conversations, _ = run([*rows[:1], message("a.1", "a"), *others], **{**changes, "languages": []})
        assert ids(conversations, "a") == [["a", "a.1"]]


def test_cycles_are_orphans():
    rows = [message("a", "a.1", role="prompter"), message("a.1", "a"), *trees_in_both_splits()]
    selection = keep_messages(Selection.of(frame(rows)), VALID, params())
    assert len(selection.messages) == 4
    assert selection.funnel.dropped["orphan"]["messages"] == 2


def test_a_filter_that_its_parameter_turns_off_is_not_in_the_funnel():
    off = {"tree_states": [], "require_review": False}
    assert set(run(trees_in_both_splits(), **off)[1]["dropped"]) & {reason for reason, *_ in FILTERS} == {
        "deleted",
        "below_a_dropped_message",
    }


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


def test_every_reason_is_in_the_documentation_and_none_but_those():
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    table = page.split("| reason in the funnel |")[1].split("\n\n")[0]
    documented = {reason for row in table.splitlines() for reason in re.findall(r"`(\w+)`", row.split(" | ")[0])}
    reasons = set(PARAMETERS)
    assert reasons <= documented, f"add to the table of filters in docs/data.md: {reasons - documented}"
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "stages").rglob("*.py"))
    assert [reason for reason in documented if f'"{reason}"' not in code] == []
