"""Choose the next token from a model's logits.

onnxruntime-genai can sample, too, but it fixes temperature and seed when a generator is made. Here a generator is used
for several answers (prompt_cache.py), each with its own sampling.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep all tokens.

    Raises ValueError, one line with every problem, when a value is out of its range.
    """

    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 50
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "max_tokens must be an integer, at least 1": _integer(self.max_tokens, 1),
            "temperature must be a number from 0 to 5": _number(self.temperature) and 0 <= self.temperature <= 5,
            "top_p must be a number above 0, at most 1": _number(self.top_p) and 0 < self.top_p <= 1,
            "top_k must be an integer, at least 0": _integer(self.top_k, 0),
            "repetition_penalty must be a number from 0.1 to 10": _number(self.repetition_penalty)
            and 0.1 <= self.repetition_penalty <= 10,
            "seed must be an integer, at least 0": self.seed is None or _integer(self.seed, 0),
        }
        if wrong := [text for text, right in checks.items() if not right]:
            raise ValueError("; ".join(wrong))


def _integer(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def choose(logits: np.ndarray, seen: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """The id of the next token.

    `logits` has shape (vocabulary,); `seen` holds the ids of the prompt and of the answer so far. The steps come in
    the order of Hugging Face's `generate`: repetition penalty, temperature, top-k, top-p.
    """
    logits = logits.astype(np.float32)  # a copy: the caller's array may be the model's own memory
    if sampling.repetition_penalty != 1:
        # https://arxiv.org/abs/1909.05858, section 4.1
        ids = np.unique(seen)
        penalty = np.float32(sampling.repetition_penalty)
        logits[ids] = np.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    kept = np.arange(len(logits))
    if 0 < sampling.top_k < len(logits):
        kept = np.argpartition(logits, -sampling.top_k)[-sampling.top_k :]
    kept = kept[np.lexsort((kept, -logits[kept]))]  # most likely first; the id breaks ties
    scaled = (logits[kept] - logits[kept[0]]).astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        # The smallest set of most likely tokens that reaches top_p (https://arxiv.org/abs/1904.09751).
        size = int(np.searchsorted(probabilities.cumsum(), sampling.top_p)) + 1
        kept, probabilities = kept[:size], probabilities[:size] / probabilities[:size].sum()
    return int(random.choice(kept, p=probabilities))
