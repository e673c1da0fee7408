"""phi-2 and OASST1 as a hub on loopback serves them: the pinned names, small contents."""

from pathlib import Path

from stages.common.params import read_params
from tests.support.hub import Hub
from tests.support.project import ROOT
from tests.support.rows import message

REFERENCE = read_params(ROOT / "recipes/phi2-oasst1.yaml")
SHARD = "00000-of-00001-0123456789abcdef"
ALL_TREES = "2023-04-12_oasst_all.trees.jsonl.gz"
# All that is changed in the reference recipe for a CPU and a tiny model: steps, lengths, precision.
SMALLER = {
    "max_steps": 2,
    "save_steps": 1,
    "logging_steps": 1,
    "eval_steps": 1,
    "fp16": False,
    "eval_dtype": "float32",
    "max_length": 128,
    "max_new_tokens": 4,
    "bootstrap_samples": 100,
    "export_max_perplexity_increase": 10.0,
}


def oasst_rows(first: int, count: int) -> list[dict]:
    """`count` trees in the full flat schema of the hub: two ranked answers, a follow-up, labels and detoxify filled."""
    labels = {"name": ["spam", "quality"], "value": [0.0, 0.75], "count": [3, 3]}
    extra = {
        "user_id": "u",
        "created_date": "2023-02-05T14:23:50.983374+00:00",
        "review_count": 3,
        "model_name": None,
        "detoxify": {"toxicity": 0.001, "severe_toxicity": 0.0},
        "emojis": {"name": ["+1"], "count": [1]},
        "labels": labels,
    }
    rows = []
    for i in range(first, first + count):
        rows += [
            message(f"t{i}", role="prompter", text=f"What is {i} + 1?", **extra),
            message(f"t{i}.b", f"t{i}", text="I do not know.", rank=1, **extra),
            message(f"t{i}.a", f"t{i}", text=f"It is {i + 1}.", rank=0, **extra),
            message(f"t{i}.a.p", f"t{i}.a", role="prompter", text="Thanks!", **extra),
        ]
    return rows


def settings(hub: Hub, home: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
