"""OASST1's full size through the real prepare stage: totals, memory, and no tree lost."""

import json
from pathlib import Path

import pandas as pd
import pytest
from oasst_size import LANGUAGES, MESSAGES, READY_MESSAGES, READY_TREES, TREES, write_all_trees

from stages.common.artifacts import write_json

pytestmark = pytest.mark.slow


def test_all_trees_in_two_gibibytes(project):
    raw = project.folder / "data/raw"
    (raw / "1").mkdir(parents=True)
    write_all_trees(raw / "1/2023-04-12_oasst_all.trees.jsonl.gz")
    write_json(raw / "source.json", [{"source": "here", "revision": None}])
    project.set(languages=[], validation_fraction=0.05)
    (project.folder / "measured.py").write_text(
        "import resource, runpy\n"
        "runpy.run_module('stages.prepare', run_name='__main__')\n"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peak = int(project.run("measured").stdout.split("peak")[1])  # KiB
    assert peak < 2 * 1024**2

    funnel = json.loads((project.folder / "reports/funnel.json").read_text(encoding="utf-8"))
    assert funnel["read"]["messages"] == MESSAGES == 161_443
    assert funnel["read"]["trees"] == TREES == 66_497
    assert len(funnel["read"]["by_language"]) == len(LANGUAGES) == 35
    assert funnel["dropped"]["tree_state"]["messages"] == MESSAGES - READY_MESSAGES
    assert funnel["dropped"]["tree_state"]["trees_left"] == READY_TREES == 10_364
    kept = {split: counts["conversations"] for split, counts in funnel["kept"].items()}
    assert sum(kept.values()) == READY_TREES  # one conversation a tree
    for split, conversations in kept.items():
        frame = pd.read_parquet(Path(project.folder / f"data/prepared/{split}.parquet"))
        assert len(frame) == conversations == frame["message_tree_id"].nunique()
