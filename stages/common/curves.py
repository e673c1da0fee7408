"""The loss curves of a training: tables of its log, written while it goes on."""

from pathlib import Path
from typing import Any

import pandas as pd
from transformers import TrainerCallback

from stages.common.artifacts import write_whole


def loss_curves(log_history: list[dict[str, Any]]) -> dict[str, pd.DataFrame]:
    """The trainer's log as a table a split: step, loss (nats a supervised token) and, in train, learning rate."""
    train = [(e["step"], round(e["loss"], 6), e["learning_rate"]) for e in log_history if "loss" in e]
    held_out = [(e["step"], round(e["eval_loss"], 6)) for e in log_history if "eval_loss" in e]
    return {
        "train": pd.DataFrame(train, columns=["step", "loss", "learning_rate"]),
        "validation": pd.DataFrame(held_out, columns=["step", "loss"]),
    }


def write_curves(log_history: list[dict[str, Any]], folder: Path) -> None:
    """Write train.csv and validation.csv into `folder`."""
    for split, curve in loss_curves(log_history).items():
        with write_whole(folder / f"{split}.csv") as path:
            curve.to_csv(path, index=False)


class LiveCurves(TrainerCallback):
    """Write the loss curves so far, each complete, whenever a point is added: `dvc plots show` draws them meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_log(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        write_curves(state.log_history, self.folder)
