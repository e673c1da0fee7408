"""What answers look like beside those of the data: whether they end by themselves, their length, their repetition."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from stages.common.masks import question_of

WORDS = 4  # tokens of a sequence that counts as repeated where it comes twice in an answer


def ended(answer: Sequence[int], ends: Sequence[int]) -> bool:
    """Whether an answer (token ids) ended by itself, at one of the end tokens."""
    return len(answer) > 0 and answer[-1] in ends


def reference_of(row: Any, max_new_tokens: int) -> list[int]:
    """The token ids of the first answer in a conversation (a row with input_ids, assistant_masks), its end token
    included, cut as an answer of a model is."""
    start = len(question_of(row))
    mask = list(row.assistant_masks)
    stop = mask.index(0, start) if 0 in mask[start:] else len(mask)
    return [int(token) for token in row.input_ids[start : min(stop, start + max_new_tokens)]]


def repeated(answers: Sequence[Sequence[int]]) -> float:
    """The share of all sequences of four tokens that stood in the same answer before."""
    grams = [[tuple(ids[i : i + WORDS]) for i in range(len(ids) - WORDS + 1)] for ids in answers]
    total = sum(len(each) for each in grams)
    return 1 - sum(len(set(each)) for each in grams) / total if total else 0.0


def answer_figures(answers: Sequence[Sequence[int]], ends: Sequence[int]) -> dict[str, float]:
    """Of answers (token ids): the share that ended by themselves, their median length in tokens, and the share of
    repeated sequences of four tokens."""
    return {
        "ended": round(float(np.mean([ended(ids, ends) for ids in answers])), 4),
        "median_tokens": float(np.median([len(ids) for ids in answers])),
        "repeated_4grams": round(repeated(answers), 4),
    }
