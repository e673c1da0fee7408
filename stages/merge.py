"""Merge the LoRA adapter into its base: one ordinary model that any library loads, checked against the unmerged one.

Reads models/base/, models/adapter/ and data/raw/source.json.
Writes models/merged/ (safetensors, tokenizer, chat template, generation config, and a model card made from what the
earlier stages recorded). Run: `dvc repro merge`
"""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from stages.common import memory
from stages.common.artifacts import read_json, write_text, write_whole
from stages.common.errors import StageError, first_line, run_stage
from stages.common.machine import Machine, this_machine
from stages.common.models import load_config, load_model, load_tokenizer, quantization_config, torch_dtype
from stages.common.params import load_params

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RAW_SOURCE = Path("data/raw/source.json")
BASE = Path("models/base")
ADAPTER = Path("models/adapter")
MERGED = Path("models/merged")

# What merged and unmerged model are compared on: prose, code, numbers, other scripts.
PROBES = (
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
    "17 * 23 = ?",
    "¿Por qué el cielo es azul? 空はなぜ青いのですか。",
)


def copy_dequantized(source: "PreTrainedModel", target: "PreTrainedModel") -> None:
    """Give `target`, layer by layer, the weights of a 4-bit model's quantised layers as training multiplied by them."""
    import bitsandbytes as bnb
    import torch
    from transformers.pytorch_utils import Conv1D

    for name, layer in source.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            if isinstance(target.get_submodule(name), Conv1D):
                weight = weight.T
            with torch.no_grad():
                target.get_parameter(f"{name}.weight").copy_(weight)


def attach(model: "PreTrainedModel", adapter: Path) -> Any:
    """`model` with the adapter on it, not merged. Raises StageError when the adapter belongs to another model."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    mend = f"Delete {adapter} and run `dvc repro train`."
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise StageError(f"{weights} is missing; pickled weights (.bin) are never loaded. {mend}")
    try:
        with safe_open(weights, "pt") as file:
            saved = set(file.keys())
        attached = PeftModel.from_pretrained(model, adapter, local_files_only=True).eval()
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise StageError(f"{adapter} does not fit {BASE} ({first_line(error)}). {mend}") from error
    if lacking := sorted(set(get_peft_model_state_dict(attached)) ^ saved):  # PEFT would go on without them
        raise StageError(f"{adapter} does not fit {BASE} (only one of them has {lacking[0]}). {mend}")
    return attached


def probe_logits(model: Any, tokenizer: "PreTrainedTokenizerBase") -> list["torch.Tensor"]:
    """Logits (tokens, vocabulary) of the model on each probe prompt, in float32 on the CPU."""
    import torch

    result = []
    for prompt in PROBES:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        with torch.no_grad():
            result.append(model(input_ids=ids.to(model.device), use_cache=False).logits[0].float().cpu())
    return result


def mean_difference(ours: list["torch.Tensor"], theirs: list["torch.Tensor"]) -> float:
    """Mean absolute difference of logits over all tokens of all probes."""
    import torch

    return torch.cat([(a - b).abs().flatten() for a, b in zip(ours, theirs, strict=True)]).mean().item()


def choose_device(base: Path, trained: SimpleNamespace, merge_base: str, machine: Machine) -> bool:
    """Whether the GPU can hold the model in float32: a card that trains it in 4 bits need not. Else the CPU merges.

    Raises StageError when it has too little memory, too.
    """
    shape = memory.shape_of(load_config(base), trained.target_modules, trained.lora_r)
    needed = memory.merge_bytes(shape, merge_base, trained.bnb_4bit_use_double_quant)
    if machine.gpu is not None and memory.CUDA_CONTEXT + needed <= machine.gpu:
        return True
    less = "Set merge_base: original, or run" if merge_base == "dequantized" else "Run"
    mend = f"{less} `dvc repro` on a larger machine, where {ADAPTER} is (dvc push, dvc pull)."
    memory.check_room("merging takes", memory.LIBRARIES + needed, machine.memory, "this machine", mend)
    return False


def merge_adapter(
    base: Path,
    adapter: Path,
    merge_base: str,
    quantization: Any,
    attn_implementation: str,
    tokenizer: Any,
    use_gpu: bool = True,
) -> tuple["PreTrainedModel", list["torch.Tensor"]]:
    """The merged model in float32, and the probe logits of the unmerged one that it must reproduce.

    `dequantized` merges into the weights that training saw, and is compared with the 4-bit model and its adapter;
    `original` merges into the weights as fetched, and is compared with those and the adapter.
    """
    import torch

    expected: list[torch.Tensor] = []
    loading: dict[str, Any] = {"attn_implementation": attn_implementation, "use_gpu": use_gpu}
    if merge_base == "dequantized":
        # Before the larger one: loading in 4 bits takes more for a moment than it keeps.
        trained = load_model(base, torch.float32, quantization=quantization, **loading)
        model = load_model(base, torch.float32, **loading)
        copy_dequantized(trained, model)
        expected = probe_logits(attach(trained, adapter), tokenizer)
        del trained
    else:
        model = load_model(base, torch.float32, **loading)
    with_adapter = attach(model, adapter)
    if not expected:
        expected = probe_logits(with_adapter, tokenizer)
    return with_adapter.merge_and_unload(), expected


def plain_template(template: str) -> str:
    """A chat template without its {% generation %} marks, which only training needs and few other programs know."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


def model_card(
    training: dict[str, Any], base: dict[str, Any], datasets: list[dict[str, Any]], merge: SimpleNamespace
) -> str:
    """The Markdown of the model's README, with the hub's front matter; every figure is from a recorded artifact."""
    licence = base["license"] or "other"
    params = "\n".join(f"| {key} | `{value}` |" for key, value in training["params"].items())
    data = "; ".join(
        f"`{d['source']}` at {'`' + d['revision'] + '`' if d['revision'] else 'the version in this repository'}, "
        f"licence {d['license'] or 'not stated'}"
        for d in datasets
    )
    facts = {
        "Base model": f"`{base['source']}` at `{base['revision']}`, licence {base['license'] or 'not stated'}",
        "Data": data,
        "Trained on": f"{training['train_conversations']} conversations, "
        f"{training['train_supervised_tokens']} supervised tokens (the assistant's)",
        "Merged": f"LoRA into the {merge.merge_base} base, weights in {merge.merge_dtype}",
        "Held-out loss, 4-bit base with adapter": f"{training['held_out_loss_before']:.4f} before, "
        f"{training['held_out_loss_after']:.4f} after training (nats a supervised token, "
        f"{training['held_out_conversations']} held-out conversations)",
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    hub_base = f"base_model: {base['source']}\n" if ":" not in base["source"] else ""
    on_hub = dict.fromkeys("/".join(d["source"].split("/")[:2]) for d in datasets if ":" not in d["source"])
    hub_data = "datasets:\n" + "".join(f"- {name}\n" for name in on_hub) if on_hub else ""
    return f"""---
license: {licence}
{hub_base}{hub_data}library_name: transformers
pipeline_tag: text-generation
tags:
- trl
- sft
- qlora
---
# A chat model fine-tuned by QLoRA

| | |
| --- | --- |
{rows}

The full comparison with the base model is in the project's `reports/metrics.json` and `reports/samples.md`.

## Use
```python
from transformers import pipeline

chat = pipeline("text-generation", model="models/merged")
print(chat([{{"role": "user", "content": "Hello!"}}], max_new_tokens=128)[0]["generated_text"][-1]["content"])
```

## Parameters
| parameter | value |
| --- | --- |
{params}
"""


def main() -> None:
    params = load_params("merge")
    training = read_json(
        ADAPTER / "training.json",
        ["params", "train_conversations", "train_supervised_tokens", "held_out_conversations"],
    )
    trained = SimpleNamespace(**training["params"])
    tokenizer = load_tokenizer(ADAPTER)

    import torch
    from transformers import GenerationConfig

    quantization = (
        quantization_config(trained.bnb_4bit_quant_type, trained.bnb_4bit_use_double_quant, torch.float32)
        if trained.load_in_4bit
        else None
    )
    # FlashAttention computes in 16 bits only, and merging is in float32.
    attn_implementation = "eager" if trained.attn_implementation == "eager" else "sdpa"
    use_gpu = choose_device(BASE, trained, params.merge_base, this_machine())
    print(f"merge: adapter into the {params.merge_base} base", flush=True)
    model, expected = merge_adapter(
        BASE, ADAPTER, params.merge_base, quantization, attn_implementation, tokenizer, use_gpu
    )
    with write_whole(MERGED) as folder:
        model.config.pad_token_id = tokenizer.pad_token_id
        model.config.eos_token_id = tokenizer.eos_token_id
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.to(torch_dtype(params.merge_dtype)).save_pretrained(folder)
        del model
        saved = load_model(folder, torch.float32, attn_implementation=attn_implementation, use_gpu=use_gpu)
        difference = mean_difference(probe_logits(saved, tokenizer), expected)
        if not difference <= params.merge_max_logit_diff:
            raise StageError(
                f"the merged model's logits differ by {difference:.4f} on average from the unmerged model's, more than "
                f"merge_max_logit_diff, {params.merge_max_logit_diff}. A merge_dtype of float32 is the most exact."
            )
        tokenizer.chat_template = plain_template(tokenizer.chat_template)
        tokenizer.save_pretrained(folder)
        card = model_card(training, read_json(BASE / "source.json"), read_json(RAW_SOURCE), params)
        write_text(folder / "README.md", card)
    print(f"merge: mean |difference of logits| to the unmerged model {difference:.5f} -> {MERGED}/")


if __name__ == "__main__":
    run_stage(main, one_at_a_time=True)
