"""OASST1's full size through the real prepare stage, in each of its forms: totals, memory, and no tree lost."""

import json
from pathlib import Path

import pandas as pd
import pytest

from bench.oasst_size import (
    LANGUAGES,
    MESSAGES,
    READY_MESSAGES,
    READY_TREES,
    SPLITS,
    TREES,
    write_splits,
    write_trees,
)
from stages.common.artifacts import write_json
from stages.conversations.known import OASST1
from tests.support.conversations import check_funnel

pytestmark = pytest.mark.slow
EXPORT = "OpenAssistant/oasst1/2023-04-12_oasst_{}.trees.jsonl.gz"


# Long: parts of the largest one. That each form is read right, small ones show (tests/whole/test_hub.py).
PARTS = [pytest.param(form, marks=pytest.mark.long) for form in ("ready trees", "splits")]


@pytest.mark.parametrize("form", ["all trees", *PARTS])
def test_the_full_size_in_two_gibibytes(form, project):
    raw = project.folder / "data/raw"
    (raw / "1").mkdir(parents=True)
    if form == "splits":
        source, marked = "OpenAssistant/oasst1", write_splits(raw / "1")
    else:
        source = EXPORT.format(form.split()[0])
        marked = write_trees(raw / "1" / Path(source).name, ready_alone=form == "ready trees")
    write_json(raw / "source.json", [{"source": source, "revision": OASST1, "hub": source, "license": None}])
    project.set(languages=[], validation_fraction=0.05)
    (project.folder / "measured.py").write_text(
        "import resource\n"
        "from stages.common.entry import run\n"
        "run('stages.prepare', lock='prepare')\n"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    result = project.run("measured")
    peak = int(result.stdout.split("peak")[1])  # KiB
    assert peak < 2 * 1024**2
    assert "messages in" not in result.stderr  # the counts are those that everybody knows

    funnel = json.loads((project.folder / "reports/funnel.json").read_text(encoding="utf-8"))
    check_funnel(funnel)
    everything = form == "all trees"
    assert funnel["read"]["messages"] == (MESSAGES if everything else READY_MESSAGES)
    assert funnel["read"]["trees"] == (TREES if everything else READY_TREES)
    assert (MESSAGES, TREES, READY_MESSAGES, READY_TREES) == (161_443, 66_497, 88_838, 10_364)
    assert len(funnel["read"]["by_language"]) == len(LANGUAGES) == 35
    if not everything:  # the real rows' messages have some 500 characters on average
        assert 400 < funnel["read"]["characters"] / READY_MESSAGES < 700
    dropped = {reason: counts["messages"] for reason, counts in funnel["dropped"].items()}
    assert dropped["tree_state"] == (MESSAGES - READY_MESSAGES if everything else 0)
    assert funnel["dropped"]["tree_state"]["trees_left"] == READY_TREES
    assert dropped["deleted"] == marked["deleted"] > 100
    assert dropped["rejected_in_review"] == marked["rejected"] > 100
    for reason in ("bad_row", "empty", "duplicate_id", "orphan", "wrong_role", "duplicate_conversation"):
        assert dropped[reason] == 0
    kept = {split: counts["conversations"] for split, counts in funnel["kept"].items()}
    assert sum(kept.values()) == READY_TREES  # one conversation a tree
    for split, conversations in kept.items():
        frame = pd.read_parquet(Path(project.folder / f"data/prepared/{split}.parquet"))
        assert len(frame) == conversations == frame["message_tree_id"].nunique()
    if form == "splits":  # the hub's own
        held_out = pd.read_parquet(raw / "1/validation.parquet")
        assert len(held_out) == SPLITS["validation"] == 4_401
        assert kept["validation"] == held_out["message_tree_id"].nunique()
