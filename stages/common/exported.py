"""An exported model, measured in the same way as the model from which it was made."""

from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pandas as pd
from tqdm.auto import tqdm


def penalised(logits: np.ndarray, answer: list[int], penalty: float) -> np.ndarray:
    """The logits with those of the tokens in `answer` lowered, as generation.greedy_answers lowers them."""
    logits = logits.copy()
    said = logits[..., answer]
    logits[..., answer] = np.where(said > 0, said / penalty, said * penalty)
    return logits


class Exported:
    """An exported model: its logits, its score, its agreement with other answers."""

    def __init__(self, folder: Path) -> None:
        self._model = og.Model(str(folder))

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits of shape (tokens, vocabulary): at each position, for the token after it."""
        settings = og.GeneratorParams(self._model)
        settings.set_search_options(max_length=len(ids) + 1, batch_size=1)
        generator = og.Generator(self._model, settings)
        generator.append_tokens(np.array(ids, dtype=np.int32))
        logits: np.ndarray = generator.get_output("logits")[0]
        return logits

    def score(self, rows: pd.DataFrame, progress: str) -> pd.DataFrame:
        """As scoring.score: columns nll (nats), tokens and correct, one row a conversation."""
        results = []
        for row in tqdm(rows.itertuples(), total=len(rows), desc=progress, unit="conv"):
            ids = np.array(row.input_ids)
            positions = np.flatnonzero(row.assistant_masks)
            positions = positions[positions > 0]
            logits = self.logits(ids.tolist())[positions - 1].astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            log_normaliser = np.log(np.exp(logits).sum(axis=1))
            nll = log_normaliser - logits[np.arange(len(positions)), ids[positions]]
            results.append((float(nll.sum()), len(positions), int((logits.argmax(axis=1) == ids[positions]).sum())))
        return pd.DataFrame(results, columns=["nll", "tokens", "correct"])

    def answers(
        self, prompts: list[list[int]], max_new_tokens: int, repetition_penalty: float = 1.0
    ) -> list[list[int]]:
        """As generation.greedy_answers: the token ids of the greedy answer to each prompt, with its end token."""
        found = []
        for prompt in tqdm(prompts, desc="answering, exported", unit="answer"):
            settings = og.GeneratorParams(self._model)
            settings.set_search_options(max_length=len(prompt) + max_new_tokens, batch_size=1, do_sample=False)
            generator = og.Generator(self._model, settings)
            generator.append_tokens(np.array(prompt, dtype=np.int32))
            answer: list[int] = []
            while not generator.is_done():
                if answer and repetition_penalty != 1:
                    generator.set_logits(penalised(generator.get_logits(), answer, repetition_penalty))
                generator.generate_next_token()
                answer.append(int(generator.get_next_tokens()[0]))  # the generator's own sequence lacks the end token
            found.append(answer)
        return found

    def agreement(self, prompts: list[list[int]], answers: list[list[int]]) -> float:
        """The share of the answers' tokens that are this model's first choice, too, after the tokens before them."""
        same = total = 0
        for prompt, answer in zip(prompts, answers, strict=True):
            chosen = self.logits(prompt + answer)[len(prompt) - 1 : -1].argmax(axis=1)
            same += int((chosen == np.array(answer)).sum())
            total += len(answer)
        return same / total
