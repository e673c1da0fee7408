"""Which tokens of a conversation are supervised: the mask that tokenize writes, and what other stages read from it."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

UNSUPERVISED = -100  # the label that PyTorch's cross entropy ignores


def labels_of(ids: Iterable[int], mask: Iterable[int]) -> list[int]:
    """The label of each token: its own id where it is supervised, UNSUPERVISED elsewhere."""
    return [token if supervised else UNSUPERVISED for token, supervised in zip(ids, mask, strict=True)]


def question_of(row: Any) -> list[int]:
    """The token ids of a conversation (a row with input_ids, assistant_masks) up to where its first answer begins."""
    return list(row.input_ids[: list(row.assistant_masks).index(1)])


def supervised_tokens(rows: pd.DataFrame) -> int:
    """How many tokens of all conversations are supervised."""
    return sum(int(np.sum(mask)) for mask in rows["assistant_masks"])
