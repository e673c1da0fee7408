"""What ways to quantise the exported model cost: perplexity on the held-out answers, and size.

Exports models/merged/ in each way into a temporary folder, as the export stage does, and scores the half of the
held-out conversations that chooses. KL: the Kullback-Leibler divergence of its next tokens from the merged model's, in
nats a supervised token. It tells ways apart where perplexities of so few tokens do not.
Run: `python -m bench.quantisation` (1 to 3 minutes a way); `--ways 5 6` tries only those numbers
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from stages.common.artifacts import read_parquet
from stages.common.exported import Exported
from stages.common.halves import choosing
from stages.common.model_files import load_tokenizer
from stages.common.models import load_model
from stages.common.params import read_params
from stages.common.schema import ExportParams
from stages.common.scoring import perplexity_of, score
from stages.export import BATCH, SOURCES, TOKENIZED, export

MERGED = SOURCES["tuned"]
# precision, method, block size, symmetric, layers in 8 bits, mean bits of a weight
WAYS = (
    ("int4", "default", 32, True, (), None),
    ("int4", "rtn", 32, False, (), None),
    ("int4", "k_quant", 32, False, (), None),
    ("int4", "k_quant", 32, False, ("lm_head",), None),
    ("int4", "rtn", 32, False, ("qkv_proj", "gate_proj", "down_proj", "lm_head"), None),
    ("int4", "rtn", 16, False, ("qkv_proj", "gate_proj", "up_proj", "down_proj", "lm_head"), None),
    ("int4", "gptq", 32, False, (), None),
    ("int4", "gptq", 32, False, ("lm_head",), None),
    ("int4", "gptq", 32, False, ("lm_head",), 6.16),
    ("int4", "gptq", 32, False, ("lm_head",), 7.0),
    ("int4", "gptq", 32, False, ("lm_head",), 8.0),
    ("int8", "rtn", 32, False, (), None),
)


Predictions = list[torch.Tensor]  # of each conversation: log probabilities, shape (supervised tokens, vocabulary)


def predictions(logits: Callable[[list[int]], torch.Tensor], rows: pd.DataFrame) -> Predictions:
    """What a model, which gives the logits after each token, expects at the supervised tokens."""
    found = []
    for ids, mask in zip(rows["input_ids"], rows["assistant_masks"], strict=True):
        before = np.flatnonzero(mask)[np.flatnonzero(mask) > 0] - 1
        found.append(logits(list(ids))[before].float().log_softmax(-1))
    return found


def logits_of(exported: Exported, ids: list[int]) -> torch.Tensor:
    return torch.from_numpy(exported.logits(ids))


def divergence(expected: Predictions, got: Predictions) -> float:
    sums = [float((p.exp() * (p - q)).sum()) for p, q in zip(expected, got, strict=True)]
    return sum(sums) / sum(len(p) for p in expected)


@torch.no_grad()
def reference(rows: pd.DataFrame) -> tuple[float, Predictions]:
    """The merged model's perplexity and predictions."""
    model = load_model(MERGED, torch.float32, use_gpu=False).eval()
    perplexity = perplexity_of(score(model, rows, BATCH, load_tokenizer(MERGED).pad_token_id))
    return perplexity, predictions(lambda ids: model(torch.tensor([ids])).logits[0], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ways", type=int, nargs="*", choices=range(len(WAYS)), default=range(len(WAYS)))
    ways = [WAYS[number] for number in parser.parse_args().ways]
    rows = choosing(read_parquet(TOKENIZED / "validation.parquet"))
    before, expected = reference(rows)
    print(
        f"merged: perplexity {before:.2f}\n\n"
        "| way | 8-bit layers | bits | KL | perplexity | | MB | s |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    others = read_params().model_dump(include=set(ExportParams.model_fields))
    for precision, method, block_size, symmetric, int8_layers, bits in ways:
        way = {
            "export_precision": precision,
            "export_method": method,
            "export_block_size": block_size,
            "export_symmetric": symmetric,
            "export_accuracy_level": 4,
            "export_int8_layers": list(int8_layers),
            "export_bits": bits,
        }
        params = ExportParams.model_validate({**others, **way})
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "onnx"
            began = time.perf_counter()
            export(MERGED, target, params)
            seconds = time.perf_counter() - began
            exported = Exported(target)
            after = perplexity_of(exported.score(rows, f"{precision} {method}"))
            got = predictions(partial(logits_of, exported), rows)
            size = sum(path.stat().st_size for path in target.glob("model.onnx*")) / 1e6
        label = f"{precision}, {method}, blocks of {block_size}{'' if symmetric else ', zero points'}"
        named = ", ".join(int8_layers) or "–"
        print(
            f"| {label} | {named} | {bits or ''} | {divergence(expected, got):.4f} | {after:.2f} | "
            f"{after / before - 1:+.1%} | {size:.0f} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
