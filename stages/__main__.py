"""Run one stage of dvc.yaml: `python -m stages NAME`, as DVC does. Only those that fetch may reach the network."""

import sys

from stages.common.entry import run_named
from stages.common.errors import StageError
from stages.common.pipeline import read_pipeline

NETWORKED = ("fetch", "fetch_model")

if __name__ == "__main__":
    try:
        names = list(read_pipeline())
    except StageError as error:
        sys.exit(f"error: {error}")
    run_named("stages", {name: name in NETWORKED for name in names}, lock=True)
