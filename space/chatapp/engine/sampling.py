"""Choose the next token from a model's logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_TOP_LOGPROBS = 20
# Less than the log probability of any token that may be drawn, and small enough for float32.
FAR_BELOW = 2000


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep all tokens.

    `repetition_penalty` None is the model's own, with which its answers were measured; 1 is off.
    `json_object`: the answer is one JSON object. `logprobs`: report the log probability of each token, and of this many
    most likely tokens in its place (None: report nothing).

    Raises ValueError, one line with every problem, when a value is out of its range.
    """

    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 50
    repetition_penalty: float | None = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    json_object: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "max_tokens must be an integer, at least 1": _integer(self.max_tokens, 1),
            "temperature must be a number from 0 to 5": _number(self.temperature) and 0 <= self.temperature <= 5,
            "top_p must be a number above 0, at most 1": _number(self.top_p) and 0 < self.top_p <= 1,
            "top_k must be an integer, at least 0": _integer(self.top_k, 0),
            "repetition_penalty must be a number from 0.1 to 10": self.repetition_penalty is None
            or (_number(self.repetition_penalty) and 0.1 <= self.repetition_penalty <= 10),
            "seed must be an integer, at least 0": self.seed is None or _integer(self.seed, 0),
            "presence_penalty must be a number from -2 to 2": _number(self.presence_penalty)
            and -2 <= self.presence_penalty <= 2,
            "frequency_penalty must be a number from -2 to 2": _number(self.frequency_penalty)
            and -2 <= self.frequency_penalty <= 2,
            f"logprobs must be an integer from 0 to {MAX_TOP_LOGPROBS}": self.logprobs is None
            or (_integer(self.logprobs, 0) and self.logprobs <= MAX_TOP_LOGPROBS),
        }
        if wrong := [text for text, right in checks.items() if not right]:
            raise ValueError("; ".join(wrong))


def _integer(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


Ids = Sequence[int] | np.ndarray


def choose(logits: np.ndarray, seen: Ids, sampling: Sampling, random: np.random.Generator, prompt: int = 0) -> int:
    """The id of the next token.

    `logits` has shape (vocabulary,). `seen` holds the ids of the prompt (the first `prompt` of them) and of the answer
    so far. The steps come in the order of Hugging Face's `generate`: penalties, temperature, top-k, top-p.
    """
    logits = _penalised(logits, seen, prompt, sampling)
    if sampling.temperature == 0:
        return int(logits.argmax())
    kept, probabilities = _kept(logits, sampling)
    return int(random.choice(kept, p=probabilities))


def scores(
    logits: np.ndarray, seen: Ids, sampling: Sampling, random: np.random.Generator, prompt: int = 0
) -> np.ndarray:
    """A score for each token. The best one is the next token, also when some tokens are forbidden later.

    With Gumbel noise the best of the allowed tokens is a sample of them (https://arxiv.org/abs/1411.0030, section 2).
    Tokens outside of top-k and top-p come far below, most likely first: one is chosen if all others are forbidden.
    """
    logits = _penalised(logits, seen, prompt, sampling)
    if sampling.temperature == 0:
        return logits
    kept, probabilities = _kept(logits, sampling)
    scored = logits - logits.max() - FAR_BELOW
    scored[kept] = np.log(np.maximum(probabilities, 1e-300)) + random.gumbel(size=len(kept))
    return scored


def _penalised(logits: np.ndarray, seen: Ids, prompt: int, sampling: Sampling) -> np.ndarray:
    logits = logits.astype(np.float32)  # a copy: the caller's array may be the model's own memory
    if sampling.repetition_penalty not in (None, 1):
        # https://arxiv.org/abs/1909.05858, 4.1. The prompt does not count: it has the token that ends an answer.
        ids = np.unique(np.asarray(seen[prompt:], dtype=np.int64))
        penalty = np.float32(sampling.repetition_penalty)
        logits[ids] = np.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        # OpenAI's formula; as in its API, the prompt does not count.
        said, counts = np.unique(np.asarray(seen[prompt:], dtype=np.int64), return_counts=True)
        logits[said] -= (sampling.frequency_penalty * counts + sampling.presence_penalty).astype(np.float32)
    return logits


def _kept(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The ids that top-k and top-p keep, most likely first, and their probabilities."""
    if 0 < sampling.top_k < len(logits):
        kept = np.argpartition(logits, -sampling.top_k)[-sampling.top_k :]
    else:
        kept = np.arange(len(logits))
    kept = kept[np.lexsort((kept, -logits[kept]))]  # most likely first; the id breaks ties
    scaled = (logits[kept] - logits[kept[0]]).astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        # The smallest set of most likely tokens that reaches top_p (https://arxiv.org/abs/1904.09751).
        size = int(np.searchsorted(probabilities.cumsum(), sampling.top_p)) + 1
        kept, probabilities = kept[:size], probabilities[:size] / probabilities[:size].sum()
    return kept, probabilities
