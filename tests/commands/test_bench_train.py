"""The benchmark of training: its count of operations, and its table in the documentation."""

import json

import pandas as pd
import pytest

from bench import train
from bench.floor import operations
from bench.machine import published
from stages.common.artifacts import read_json
from stages.common.model_files import load_config

recorded = pytest.mark.skipif(not train.RESULTS.is_file(), reason="the benchmark was not run")


@recorded
def test_the_page_shows_the_recorded_results():
    results = json.loads(train.RESULTS.read_text(encoding="utf-8"))
    assert published("bench.train") == train.table(results)
    assert set(train.SIDES) <= set(results["sides"]) and results["repeats"] >= 5


def test_operations_by_hand(tiny_llama):
    """Two layers of width 64, 4 heads of which 2 have keys, 128 within; two conversations of 3 and 2 tokens."""
    rows = pd.DataFrame({"length": [3, 2], "assistant_masks": [[0, 1, 1], [0, 1]]})
    config = load_config(tiny_llama)
    needed, shapes = operations(config, rows, ["q_proj"], 8)
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert sum(inner * outer * count for (inner, outer), count in shapes.items()) == weights
    assert needed["frozen layers"] == 5 * weights * 2 * 2  # forward, and the gradient of the input
    assert needed["output layer"] == 3 * 64 * config.vocab_size * 2 * 2
    assert needed["attention"] == (6 + 3) * 64 * 2 * 2 * (2 + 4)  # each token sees itself and those before it
    assert needed["LoRA"] == 5 * 2 * 8 * (64 + 64) * 2 * 3


def test_a_table_compares_each_side_with_the_project():
    sides = {name: {"seconds": 10.0, "peak": 2.0, "held_out_loss": 2.5} for name in ("literal", "packed", "project")}
    sides["project"]["seconds"] = 4.0
    sides["floor"] = {"seconds": 3.0, "gflops": 150.0}
    versions = {"torch": "1", "trl": "2", "machine": "2 cores", "repeats": 5, "tokens": 2000}
    said = train.table({"sides": sides, **versions})
    assert "| literal | 200 | 2.50 | 2.0 | 2.500 |" in said and "| project | 500 | 1.00 |" in said
    assert "| floor | 667 | 0.75 |  |  |" in said and "floor: 150" in said


@recorded
def test_the_results_say_where_they_come_from():
    results = read_json(train.RESULTS)
    assert len(results["commit"]) == 40 and "cores of" in results["machine"]
