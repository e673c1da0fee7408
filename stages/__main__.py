"""Run one stage: `python -m stages NAME`, as dvc.yaml does. Only fetch may reach the network."""

from stages.common.entry import run_named

STAGES = ("fetch", "prepare", "tokenize", "train", "merge", "evaluate", "export")

if __name__ == "__main__":
    run_named("stages", {name: name == "fetch" for name in STAGES}, lock=True)
