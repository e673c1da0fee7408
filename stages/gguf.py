"""Write the tuned model as GGUF files, for llama.cpp, Ollama and LM Studio, each checked against the merged model.

Reads models/merged/ and the held-out part of data/tokenized/.
Writes models/gguf/ (a file for each of `gguf_types`, and Ollama's Modelfile for the first) and reports/gguf.json (size
and perplexity of each). With an empty `gguf_types` the folder is empty.
Run: `dvc repro gguf`
"""

from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.common.artifacts import read_json, read_parquet, write_json, write_text, write_whole
from stages.common.chat import Chat, check_same_ids, end_ids, rendered_by
from stages.common.errors import StageError
from stages.common.gguf_file import check_architecture, load_weights, read_chat, split_of, write_gguf
from stages.common.halves import judging
from stages.common.model_files import check_weights, load_config, load_tokenizer
from stages.common.modelfile import modelfile, turns_of
from stages.common.models import load_model, torch_dtype
from stages.common.params import load_params
from stages.common.schema import GgufParams
from stages.common.scoring import perplexity_of, score

MERGED = Path("models/merged")
TOKENIZED = Path("data/tokenized")
COLUMNS = ("input_ids", "assistant_masks", "length", "message_tree_id")  # what is read of a tokenised conversation
GGUF = Path("models/gguf")
FIGURES = Path("reports/gguf.json")
BATCH = 8


def file_of(kind: str) -> str:
    return f"tuned-{kind}.gguf"


def check_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise StageError where the file's tokenizer and template give other tokens than training saw."""
    check_same_ids(read_chat(path), rendered_by(tokenizer), path.name)


def check_loss(kind: str, increase: float, highest: float) -> None:
    """Raise StageError when a file's perplexity rose by more than the share `highest`."""
    if not increase <= highest:
        raise StageError(
            f"gguf_types: {kind}: the file's perplexity is {increase:+.1%} against the merged model's, more than "
            f"export_max_perplexity_increase, {highest:.1%}. Take a type with more bits, Q8_0 or F16."
        )


def measured(
    model: PreTrainedModel, paths: dict[str, Path], rows: pd.DataFrame, padding: int
) -> dict[str, dict[str, Any]]:
    """Size and perplexity of each file, its weights dequantised; `model` is the merged one, and has the last file's
    weights afterwards."""
    before = perplexity_of(score(model, rows, BATCH, padding))
    found = {}
    for kind, path in paths.items():
        print(f"gguf: scoring {path.name}", flush=True)
        load_weights(model, path)
        after = perplexity_of(score(model, rows, BATCH, padding))
        found[kind] = {
            "file": path.name,
            "bytes": path.stat().st_size,
            "perplexity_before": round(before, 4),
            "perplexity": round(after, 4),
            "perplexity_increase": round(after / before - 1, 6),
        }
    return found


def write_modelfile(folder: Path, kind: str, tokenizer: PreTrainedTokenizerBase, system_prompt: str) -> None:
    """Write Ollama's Modelfile, or say why there is none."""
    turns = turns_of(Chat.of(tokenizer))
    if turns is None:
        print(
            "warning: gguf: the chat template is more than fixed texts around each message. No Modelfile is written; "
            "llama.cpp and LM Studio read the template in the file."
        )
        return
    ends = [tokenizer.decode([number]) for number in end_ids(tokenizer)]
    try:
        write_text(folder / "Modelfile", modelfile(file_of(kind), turns, ends, system_prompt))
    except ValueError as error:
        print(f"warning: gguf: {error}, which is in the system prompt or the chat template. No Modelfile is written.")


def main() -> None:
    params = load_params(GgufParams)
    with write_whole(GGUF) as folder:
        folder.mkdir()
        if not params.gguf_types:
            write_json(FIGURES, {})
            print("gguf: gguf_types is empty, so no file is made")
            return
        rows = judging(read_parquet(TOKENIZED / "validation.parquet", COLUMNS))
        tokenizer = load_tokenizer(MERGED)
        check_weights(MERGED)
        check_architecture(load_config(MERGED), MERGED)
        split_of(tokenizer)
        model = load_model(MERGED, torch_dtype("float32")).eval()
        paths: dict[str, Path] = {kind: folder / file_of(kind) for kind in params.gguf_types}
        for name, path in paths.items():
            print(f"gguf: {MERGED}/ to {name}", flush=True)
            write_gguf(model, tokenizer, path, name)
            check_ids(path, tokenizer)
        figures = measured(model, paths, rows, tokenizer.pad_token_id)
        for name, quality in figures.items():
            check_loss(name, quality["perplexity_increase"], params.export_max_perplexity_increase)
        prepared = read_json(TOKENIZED / "params.json", ["system_prompt"])
        write_modelfile(folder, params.gguf_types[0], tokenizer, prepared["system_prompt"])
        write_json(FIGURES, figures)
    for name, quality in figures.items():
        print(
            f"gguf: {name}: {quality['bytes'] / 1e6:.0f} MB, perplexity {quality['perplexity_before']:.2f} -> "
            f"{quality['perplexity']:.2f} ({quality['perplexity_increase']:+.1%}) -> {GGUF}/{quality['file']}"
        )
