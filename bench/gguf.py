"""Read the GGUF files with llama.cpp itself: are its prompts the tokens of training, and is its score ours?

Needs the package llama-cpp-python (`pip install llama-cpp-python` compiles llama.cpp for minutes) and the outputs of
`make all`. The score is that of the half of the held-out conversations that judges. Exits with one line when a file
gives other tokens than training saw. Run: `python -m bench.gguf`
"""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.common.artifacts import read_json, read_parquet
from stages.common.chat import Chat, check_same_ids
from stages.common.errors import StageError
from stages.common.exported import score_logits
from stages.common.halves import judging
from stages.common.model_files import load_tokenizer
from stages.common.scoring import perplexity_of
from stages.gguf import COLUMNS, FIGURES, GGUF, MERGED, TOKENIZED

CONTEXT = 2048


def opened(path: Path) -> Any:
    """The file in llama.cpp, which gives the logits after each token."""
    return importlib.import_module("llama_cpp").Llama(
        str(path), n_ctx=CONTEXT, n_batch=CONTEXT, logits_all=True, verbose=False
    )


def reader(model: Any) -> Callable[[list[dict[str, str]], bool], list[int]]:
    """What the file's own template and llama.cpp's tokenizer make of messages."""
    formatter = importlib.import_module("llama_cpp.llama_chat_format").Jinja2ChatFormatter
    end = model._model.token_get_text(model.token_eos())
    template = formatter(model.metadata["tokenizer.chat_template"], end, "", add_generation_prompt=False)
    prompt = formatter(model.metadata["tokenizer.chat_template"], end, "")

    def ids(messages: list[dict[str, str]], is_prompt: bool) -> list[int]:
        text = (prompt if is_prompt else template)(messages=messages).prompt
        return list(model.tokenize(text.encode(), add_bos=False, special=True))

    return ids


def logits_of(model: Any, ids: list[int]) -> np.ndarray:
    """Logits after each token, of shape (tokens, vocabulary)."""
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def perplexity(model: Any, rows: pd.DataFrame, name: str) -> float:
    return perplexity_of(score_logits(partial(logits_of, model), rows, name))


def main() -> None:
    rows = judging(read_parquet(TOKENIZED / "validation.parquet", COLUMNS))
    chat = Chat.of(load_tokenizer(MERGED))
    print("| file | MB | perplexity, dequantised weights | perplexity, llama.cpp |\n| --- | --- | --- | --- |")
    for figures in read_json(FIGURES).values():
        model = opened(GGUF / figures["file"])
        try:
            check_same_ids(chat, reader(model), figures["file"])
        except StageError as error:
            sys.exit(f"error: {error}")
        found = perplexity(model, rows, figures["file"])
        print(f"| {figures['file']} | {figures['bytes'] / 1e6:.0f} | {figures['perplexity']:.2f} | {found:.2f} |")


if __name__ == "__main__":
    main()
