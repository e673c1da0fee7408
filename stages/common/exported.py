"""An exported model, measured in the same way as the model from which it was made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from chatapp.engine.decoder import MAX_ROWS, Decoder
from chatapp.engine.sampling import Sampling, choose

GREEDY = np.random.default_rng()  # nothing is drawn from it


def score_logits(logits_of: Callable[[list[int]], np.ndarray], rows: pd.DataFrame, progress: str) -> pd.DataFrame:
    """As scoring.score: columns nll (nats), tokens and correct, one row a conversation; `logits_of` gives a model's
    logits after each token."""
    results = []
    for row in tqdm(rows.itertuples(), total=len(rows), desc=progress, unit="conv"):
        ids = np.array(row.input_ids)
        positions = np.flatnonzero(row.assistant_masks)
        positions = positions[positions > 0]
        logits = logits_of(ids.tolist())[positions - 1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        log_normaliser = np.log(np.exp(logits).sum(axis=1))
        nll = log_normaliser - logits[np.arange(len(positions)), ids[positions]]
        results.append((float(nll.sum()), len(positions), int((logits.argmax(axis=1) == ids[positions]).sum())))
    return pd.DataFrame(results, columns=["nll", "tokens", "correct"])


@dataclass
class Answer:
    prompt: list[int]
    sampling: Sampling
    ids: list[int] = field(default_factory=list)

    def choose(self, logits: np.ndarray) -> None:
        self.ids.append(choose(logits, self.ids, self.sampling, GREEDY))


class Exported:
    """An exported model: its logits, its score, its agreement with other answers."""

    def __init__(self, folder: Path) -> None:
        self._decoder = Decoder(folder)

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits of shape (tokens, vocabulary): at each position, for the token after it."""
        self._decoder.clear(0)
        return self._decoder.read(0, ids)

    def score(self, rows: pd.DataFrame, progress: str) -> pd.DataFrame:
        """As scoring.score."""
        return score_logits(self.logits, rows, progress)

    def answers(
        self, prompts: list[list[int]], max_new_tokens: int, ends: Sequence[int], repetition_penalty: float = 1.0
    ) -> list[list[int]]:
        """As generation.greedy_answers: the token ids of the greedy answer to each prompt, with its end token."""
        greedy = Sampling(temperature=0, repetition_penalty=repetition_penalty)
        longest = max(map(len, prompts)) + max_new_tokens
        at_once = max(1, min(MAX_ROWS, self._decoder.token_room // longest))
        answers: list[list[int]] = []
        with tqdm(total=len(prompts), desc="answering, exported", unit="answer") as progress:
            for start in range(0, len(prompts), at_once):
                batch = [Answer(prompt, greedy) for prompt in prompts[start : start + at_once]]
                self._answer(batch, max_new_tokens, ends, progress)
                answers += [answer.ids for answer in batch]
        return answers

    def _answer(self, batch: list[Answer], max_new_tokens: int, ends: Sequence[int], progress: tqdm) -> None:
        for row, answer in enumerate(batch):
            self._decoder.clear(row)
            answer.choose(self._decoder.read(row, answer.prompt)[-1])
        going = list(batch)  # the answer in each row
        while going:
            for row in reversed(range(len(going))):
                if going[row].ids[-1] in ends or len(going[row].ids) == max_new_tokens:
                    last = going.pop()
                    if row < len(going):
                        going[row] = last
                        self._decoder.copy(len(going), row, self._decoder.lengths[len(going)])
                    progress.update()
            if going:
                logits = self._decoder.step([answer.ids[-1] for answer in going])
                for answer, each in zip(going, logits, strict=True):
                    answer.choose(each)

    def agreement(self, prompts: list[list[int]], answers: list[list[int]]) -> float:
        """The share of the answers' tokens that are this model's first choice, too, after the tokens before them."""
        same = total = 0
        for prompt, answer in zip(prompts, answers, strict=True):
            chosen = self.logits(prompt + answer)[len(prompt) - 1 : -1].argmax(axis=1)
            same += int((chosen == np.array(answer)).sum())
            total += len(answer)
        return same / total
