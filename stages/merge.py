"""Merge the LoRA adapter into its base: one ordinary model that any library loads, compared with the unmerged one.

Reads models/base/, models/adapter/ and data/raw/source.json.
Writes models/merged/ (safetensors, tokenizer, chat template, generation config, and a model card made from what the
earlier stages recorded). Run: `dvc repro merge`
"""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from pydantic import ValidationError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from stages.common import memory
from stages.common.adapters import attach, lora_config
from stages.common.artifacts import read_json, write_text, write_whole
from stages.common.cards import model_card
from stages.common.chat import Chat, check_same_ids, end_ids, plain_template, rendered_by
from stages.common.errors import StageError, first_line
from stages.common.machine import Machine, this_machine
from stages.common.model_files import load_config, load_tokenizer
from stages.common.models import load_model, quantization_config, torch_dtype
from stages.common.params import load_params, section_of
from stages.common.records import read_source, read_sources
from stages.common.schema import MergeParams, TrainParams

RAW_SOURCE = Path("data/raw/source.json")
BASE = Path("models/base")
ADAPTER = Path("models/adapter")
MERGED = Path("models/merged")

# Merged and unmerged model are compared on these prompts: prose, code, numbers, other scripts.
PROBES = (
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
    "17 * 23 = ?",
    "¿Por qué el cielo es azul? 空はなぜ青いのですか。",
)


def copy_dequantized(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Give `target`, layer by layer, the weights of a 4-bit model's quantised layers as training multiplied by them."""
    for name, layer in source.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            if isinstance(target.get_submodule(name), Conv1D):
                weight = weight.T
            with torch.no_grad():
                target.get_parameter(f"{name}.weight").copy_(weight)


def probe_logits(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Logits (tokens, vocabulary) of the model on each probe prompt, in float32 on the CPU."""
    chat = Chat.of(tokenizer)
    result = []
    for prompt in PROBES:
        ids = torch.tensor([chat.ids([{"role": "user", "content": prompt}])])
        with torch.no_grad():
            result.append(model(input_ids=ids.to(model.device), use_cache=False).logits[0].float().cpu())
    return result


def mean_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Mean absolute difference of logits over all tokens of all probes."""
    return torch.cat([(a - b).abs().flatten() for a, b in zip(ours, theirs, strict=True)]).mean().item()


def choose_device(base: Path, trained: TrainParams, merge_base: str, machine: Machine) -> bool:
    """Whether the GPU can hold the model in float32. A card that trains it in 4 bits may be too small for that. The CPU
    then merges.

    Raises StageError when this machine's memory is too small, too.
    """
    shape = memory.shape_of(load_config(base), lora_config(trained))
    needed = memory.merge_bytes(shape, merge_base, trained.bnb_4bit_use_double_quant)
    if machine.gpu is not None and memory.CUDA_CONTEXT + needed <= machine.gpu:
        return True
    less = "Set merge_base: original, or run" if merge_base == "dequantized" else "Run"
    remedy = f"{less} `dvc repro` on a larger machine, where {ADAPTER} is (dvc push, dvc pull)."
    memory.check_room("merging takes", memory.LIBRARIES + needed, machine.memory, "this machine", remedy)
    return False


def merge_adapter(
    base: Path,
    adapter: Path,
    merge_base: str,
    trained: TrainParams,
    tokenizer: PreTrainedTokenizerBase,
    use_gpu: bool = True,
) -> tuple[PreTrainedModel, list[torch.Tensor]]:
    """The merged model in float32, and the probe logits of the unmerged one that it must reproduce.

    `dequantized` merges into the weights that training saw, and is compared with the 4-bit model and its adapter;
    `original` merges into the weights as fetched, and is compared with those and the adapter.
    """
    expected: list[torch.Tensor] = []
    loading: dict[str, Any] = {"attn_implementation": merge_attention(trained), "use_gpu": use_gpu}
    if merge_base == "dequantized":
        # The 4-bit model first: loading it takes more memory, for a moment, than it keeps.
        quantization = quantization_config(trained, torch.float32)
        quantised = load_model(base, torch.float32, quantization=quantization, **loading)
        model = load_model(base, torch.float32, **loading)
        copy_dequantized(quantised, model)
        expected = probe_logits(attach(quantised, adapter, base), tokenizer)
        del quantised
    else:
        model = load_model(base, torch.float32, **loading)
    with_adapter = attach(model, adapter, base)
    if not expected:
        expected = probe_logits(with_adapter, tokenizer)
    return with_adapter.merge_and_unload(), expected


def merge_attention(trained: TrainParams) -> str:
    """The attention kernel for merging, which is in float32: FlashAttention computes in 16 bits only."""
    return "eager" if trained.attn_implementation == "eager" else "sdpa"


def set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model the special tokens of training, for its configuration and for generation.

    Generation stops at every token that ends an answer in the chat template.
    """
    ends = end_ids(tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer with a template without marks, which gives the tokens that training saw.

    Raises StageError where the files, read by transformers, give others.
    """
    chat = Chat.of(tokenizer)
    tokenizer.chat_template = plain_template(tokenizer.chat_template)
    tokenizer.save_pretrained(folder)
    check_same_ids(chat, rendered_by(load_tokenizer(folder)), "the merged model's tokenizer")


def check_difference(difference: float, highest: float) -> None:
    """Raise StageError when the merged model's logits differ from the unmerged model's by more than `highest`."""
    if not difference <= highest:
        raise StageError(
            f"the merged model's logits differ by {difference:.4f} on average from the unmerged model's, more than "
            f"merge_max_logit_diff, {highest}. A merge_dtype of float32 is the most exact."
        )


def trained_with(values: dict[str, Any], record: Path) -> TrainParams:
    """The parameters of the training that `record` holds. Raises StageError when they are incomplete or wrong."""
    try:
        return section_of(values, TrainParams)
    except (ValidationError, TypeError, AttributeError) as error:
        raise StageError(
            f"{record} holds no parameters of a training ({first_line(error)}). "
            f"Delete {ADAPTER} and run `dvc repro train`."
        ) from None


def main() -> None:
    params = load_params(MergeParams)
    record = ADAPTER / "training.json"
    training = read_json(record, ["params", "train_conversations", "train_supervised_tokens", "held_out_conversations"])
    trained = trained_with(training["params"], record)
    tokenizer = load_tokenizer(ADAPTER)
    use_gpu = choose_device(BASE, trained, params.merge_base, this_machine())
    print(f"merge: adapter into the {params.merge_base} base", flush=True)
    model, expected = merge_adapter(BASE, ADAPTER, params.merge_base, trained, tokenizer, use_gpu)
    set_special_tokens(model, tokenizer)
    with write_whole(MERGED) as folder:
        model.to(torch_dtype(params.merge_dtype)).save_pretrained(folder)
        del model
        saved = load_model(folder, torch.float32, attn_implementation=merge_attention(trained), use_gpu=use_gpu)
        difference = mean_difference(probe_logits(saved, tokenizer), expected)
        check_difference(difference, params.merge_max_logit_diff)
        save_tokenizer(tokenizer, folder)
        card = model_card(training, read_source(BASE / "source.json"), read_sources(RAW_SOURCE), params.model_dump())
        write_text(folder / "README.md", card)
    print(f"merge: mean |difference of logits| to the unmerged model {difference:.5f} -> {MERGED}/")
