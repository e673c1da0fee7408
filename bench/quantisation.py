"""What ways to quantise the exported model cost: perplexity on the held-out answers, and size.

Exports models/merged/ in each way into a temporary folder, as the export stage does.
Run: `python -m bench.quantisation` (about 1 minute a way)
"""

import tempfile
from pathlib import Path

import torch

from stages.common.artifacts import read_parquet
from stages.common.exported import Exported
from stages.common.model_files import load_tokenizer
from stages.common.models import load_model
from stages.common.params import read_params
from stages.common.schema import ExportParams
from stages.common.scoring import perplexity_of, score
from stages.export import BATCH, SOURCES, TOKENIZED, build

MERGED = SOURCES["tuned"]
# precision, method, block size, symmetric, layers in 8 bits
WAYS = (
    ("int4", "default", 32, True, ()),
    ("int4", "rtn", 32, True, ()),
    ("int4", "k_quant", 32, True, ()),
    ("int4", "k_quant", 32, True, ("lm_head",)),
    ("int4", "rtn", 16, False, ("qkv_proj", "down_proj", "lm_head")),
    ("int4", "rtn", 16, False, ("qkv_proj", "o_proj", "down_proj", "lm_head")),
    ("int4", "rtn", 32, False, ("qkv_proj", "up_proj", "down_proj", "lm_head")),
    ("int4", "rtn", 16, False, ("qkv_proj", "up_proj", "down_proj", "lm_head")),
    ("int8", "default", 32, True, ()),
)


def main() -> None:
    rows = read_parquet(TOKENIZED / "validation.parquet")
    pad = load_tokenizer(MERGED).pad_token_id
    before = perplexity_of(score(load_model(MERGED, torch.float32), rows, BATCH, pad))
    print(
        f"merged: perplexity {before:.2f}\n\n"
        "| way | 8-bit layers | perplexity | | MB |\n| --- | --- | --- | --- | --- |"
    )
    others = read_params().model_dump(include=set(ExportParams.model_fields))
    for precision, method, block_size, symmetric, int8_layers in WAYS:
        way = {
            "export_precision": precision,
            "export_method": method,
            "export_block_size": block_size,
            "export_symmetric": symmetric,
            "export_accuracy_level": 4,
            "export_int8_layers": list(int8_layers),
        }
        params = ExportParams.model_validate({**others, **way})
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "onnx"
            build(MERGED, target, params)
            after = perplexity_of(Exported(target).score(rows, f"{precision} {method}"))
            size = sum(path.stat().st_size for path in target.glob("model.onnx*")) / 1e6
        label = f"{precision}, {method}, blocks of {block_size}{'' if symmetric else ', zero points'}"
        named = ", ".join(int8_layers) or "–"
        print(f"| {label} | {named} | {after:.2f} | {after / before - 1:+.1%} | {size:.0f} |", flush=True)


if __name__ == "__main__":
    main()
