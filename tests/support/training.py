"""Small trainings, for tests: a few tokenised conversations, and a tiny model with a new adapter on its 4-bit form."""

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stages.common.adapters import add_adapter
from stages.common.models import load_model, quantization_config
from stages.common.schema import TrainParams
from stages.common.trainer import Trainer, build_trainer
from stages.tokenize import load_template, set_special_tokens, tokenize


def tokenizer_of(folder: Path, template: str) -> PreTrainedTokenizerBase:
    """A tiny model's tokenizer with a chat template, as the tokenize stage makes it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_special_tokens(tokenizer, load_template(template, tokenizer), len(tokenizer) + 8)
    return tokenizer


def talk(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {i} + 1?"}, {"role": "assistant", "content": f"It is {i + 1}."}]


def tokens(folder: Path, template: str, count: int = 12) -> tuple[pd.DataFrame, PreTrainedTokenizerBase]:
    """`count` short tokenised conversations, and their tokenizer."""
    tokenizer = tokenizer_of(folder, template)
    rows = pd.DataFrame({"messages": [talk(i) for i in range(count)], "trained": [[True]] * count, "lang": "en"})
    return tokenize(rows.assign(message_tree_id="t"), tokenizer, 128)[0], tokenizer


def load_tiny(folder: Path, params: TrainParams) -> PeftModel:
    """A tiny model in 4 bits (computing in float32) with a new adapter on it."""
    quantization = quantization_config(params, torch.float32)
    model = load_model(folder, torch.float32, quantization=quantization, attn_implementation=params.attn_implementation)
    return add_adapter(model, params)


def tiny_trainer(
    base: Path,
    params: TrainParams,
    rows: pd.DataFrame,
    tokenizer: Any,
    folder: Path,
    held_out: pd.DataFrame | None = None,
) -> Trainer:
    """The trainer of a tiny model over `rows`, with its checkpoints in `folder`; it is measured on `held_out`."""
    tables = (rows, rows if held_out is None else held_out)
    return build_trainer(load_tiny(base, params), params, folder, tables, tokenizer)
