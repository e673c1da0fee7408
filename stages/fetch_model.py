"""Fetch the pinned base model.

Reads the source that params.yaml names (and models/local for a local one).
Writes models/base/ (safetensors, tokenizer, config) and models/base/source.json, which records where it came from.
Run: `dvc repro fetch_model`
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from stages.common.artifacts import write_json, write_text, write_whole
from stages.common.downloads import fetch_source
from stages.common.errors import StageError, first_line
from stages.common.model_files import check_weights, load_tokenizer
from stages.common.params import load_params
from stages.common.schema import FetchModelParams
from stages.common.sources import Source, parse_source

BASE = Path("models/base")


def convert_gguf(folder: Path) -> None:
    """Replace the GGUF file in `folder`, if there is one, by safetensors (bfloat16), config and tokenizer."""
    files = list(folder.glob("*.gguf"))
    if not files:
        return
    if len(files) > 1:
        names = ", ".join(sorted(file.name for file in files))
        raise StageError(
            f"base_model: there are {len(files)} GGUF files, {names}. Put the one you mean after its path."
        )
    logging.disable_progress_bar()
    print(f"fetch_model: converting {files[0].name} to safetensors", flush=True)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=files[0].name)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=files[0].name)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        said = first_line(error).replace(f"{folder}/", "")
        raise StageError(
            f"{files[0].name} is no GGUF model that can be converted ({said}). Choose another base_model."
        ) from error
    # A model loaded from GGUF refuses save_pretrained, and its configuration says that it is quantised.
    config = loaded.config
    for name in ("quantization_config", "_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The tokenizer records whether it was loaded offline. The output must not depend on that.
    saved = folder / "tokenizer_config.json"
    text = saved.read_text(encoding="utf-8")
    write_text(saved, text.replace('"local_files_only": true', '"local_files_only": false'))
    files[0].unlink()


def check_model(folder: Path, source: Source) -> None:
    """Raise StageError unless `folder` holds what the later stages load: config, tokenizer and safetensors."""
    for pattern in ("config.json", "*.safetensors", "tokenizer*.json"):
        if not list(folder.glob(pattern)):
            raise StageError(
                f"{source.text} has no {pattern}: it is not a causal language model saved as safetensors. "
                "Correct base_model in params.yaml; pickled weights (.bin) are never loaded."
            )
    try:
        check_weights(folder)
        load_tokenizer(folder)
    except StageError as error:
        raise StageError(str(error).replace(str(folder), source.text)) from error


def main() -> None:
    params = load_params(FetchModelParams)
    source = parse_source(params.base_model, params.base_model_revision)
    with write_whole(BASE) as base:
        record = fetch_source(source, "model", base)
        convert_gguf(base)
        check_model(base, source)
        write_json(base / "source.json", record)
    print(f"fetch_model: {source.text} -> {BASE}/")
