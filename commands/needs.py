"""What each stage of a run needs: memory, disk, and the smaller parameters that would fit. All sizes are bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from commands.trace import answering_bytes, scoring_bytes, step_bytes
from stages.common import memory
from stages.common.adapters import lora_config
from stages.common.machine import Machine
from stages.common.models import training_dtype
from stages.common.schema import Params
from stages.export import BATCH as EXPORT_BATCH


def file_dtype(config: PretrainedConfig) -> str:
    """The number format of the model's weight files, by what its configuration states."""
    name = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "float32"


@dataclass(frozen=True)
class Peak:
    """Peak memory (bytes) of a stage: resident on a CPU, or on the card; `gpu` is None where none is used."""

    cpu: int
    gpu: int | None


def peaks(config: PretrainedConfig, params: Params, tokens: int) -> dict[str, Peak]:
    """The peak of each stage that loads the model; `tokens`: the longest conversation of a batch."""
    shape = memory.shape_of(config, lora_config(params))
    adapter = memory.adapter_bytes(shape, params.optim)
    scoring = scoring_bytes(config, params.per_device_eval_batch_size, tokens)
    dtype, four_bit, double = (
        training_dtype(params.fp16, params.bf16),
        params.load_in_4bit,
        params.bnb_4bit_use_double_quant,
    )
    dequantised = shape.largest_linear * memory.dtype_bytes(dtype) if four_bit else 0
    working, working_gpu = (
        max(step_bytes(config, params, tokens, on_gpu=gpu), scoring) + dequantised for gpu in (False, True)
    )
    trained = memory.weight_bytes(shape, dtype, four_bit, double) + adapter
    kept = shape.quantised * memory.dtype_bytes(dtype) if params.dequantize_once and four_bit else 0  # on a CPU alone
    merged = memory.merge_bytes(shape, params.merge_base, double)
    evaluated = memory.weight_bytes(shape, params.eval_dtype, False, False)
    read = tokens + params.max_new_tokens
    evaluating = max(scoring, answering_bytes(config, params.answer_batch_size, read, params.eval_dtype))
    stored = file_dtype(config)
    mapped = shape.parameters * memory.dtype_bytes(stored)
    loading = memory.load_peak(shape, dtype, stored, four_bit, double)
    stepping = memory.LIBRARIES + trained + kept + round(memory.FRAGMENTATION * working)
    # Export calibrates in its own process, builds in another one, and then scores the model in float32 in its own.
    calibrated = params.export_method == "gptq"
    building = round(memory.EXPORTING * shape.parameters * memory.dtype_bytes("float32"))
    building += shape.parameters * calibrated  # the rounded weights wait: at most a byte each
    scoring_export = scoring_bytes(config, EXPORT_BATCH, tokens)
    single = params.model_copy(update={"per_device_train_batch_size": 1, "gradient_checkpointing": False})
    measured = max(scoring_export, step_bytes(config, single, tokens, on_gpu=False) if calibrated else 0)
    merged_file = shape.parameters * memory.dtype_bytes(params.merge_dtype)
    measuring = shape.parameters * 4 + max(merged_file, round(memory.FRAGMENTATION * measured))
    # gguf holds the model in float32, and writes a file from memory, or scores.
    written = max((memory.GGUF_BYTES[kind] for kind in params.gguf_types), default=0.0) * shape.parameters
    converting = shape.parameters * 4 + max(merged_file, round(memory.FRAGMENTATION * scoring_export), round(written))
    loaded = memory.CUDA_CONTEXT + memory.weight_bytes(shape, dtype, four_bit, double)
    return {
        "load": Peak(loading, loaded),
        "train": Peak(max(loading, stepping), memory.CUDA_CONTEXT + trained + working_gpu),
        "merge": Peak(memory.LIBRARIES + merged + (mapped if stored != "float32" else 0), memory.CUDA_CONTEXT + merged),
        "evaluate": Peak(
            memory.LIBRARIES + evaluated + max(mapped, round(memory.FRAGMENTATION * evaluating)),
            memory.CUDA_CONTEXT + evaluated + evaluating,
        ),
        "export": Peak(memory.LIBRARIES + max(building, measuring), None),
        **({"gguf": Peak(memory.LIBRARIES + converting, None)} if params.gguf_types else {}),
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
    """The stages' peaks against this machine. Merge uses the CPU where the card cannot hold the complete model."""
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


def disk(config: PretrainedConfig, params: Params, download: int | None, fetched: bool) -> dict[str, int]:
    """Bytes yet to be written: the hub's or package's cache, the outputs, DVC's copies of them, and checkpoints."""
    shape = memory.shape_of(config, lora_config(params))
    base = shape.parameters * memory.dtype_bytes(file_dtype(config))
    outputs = shape.parameters * memory.dtype_bytes(params.merge_dtype) + shape.adapter * 4
    # At most, with scales: int4 may keep all layers in int8, and int8 keeps the embeddings in float32.
    exported = {"int4": 1.25, "int8": 2.1, "fp16": 2, "fp32": 4}[params.export_precision]
    outputs += round(shape.parameters * exported) * (1 + params.export_base)
    outputs += round(shape.parameters * sum(memory.GGUF_BYTES[kind] for kind in params.gguf_types))
    if not fetched:  # a fetched model is there, and in DVC's cache
        outputs += base
    return {
        "download": base if download is None else download,
        "outputs": outputs,
        "DVC's cache": outputs,
        "checkpoints": params.save_total_limit * (memory.adapter_bytes(shape, params.optim) - shape.adapter * 4),
    }


def smaller(params: Params) -> Iterator[dict[str, Any]]:
    """Changes of parameters that save memory, the least harmful first. Each one is added to those before it."""
    if params.merge_base == "dequantized":
        yield {"merge_base": "original"}
    if params.dequantize_once:
        yield {"dequantize_once": False}
    if not params.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    batch, evaluated = params.per_device_train_batch_size, params.per_device_eval_batch_size
    answered = params.answer_batch_size
    while batch > 1 or evaluated > 1 or answered > 1:
        batch = batch // 2 if batch % 2 == 0 else 1  # the same conversations in a step
        evaluated, answered = max(1, evaluated // 2), max(1, answered // 2)
        steps = params.per_device_train_batch_size * params.gradient_accumulation_steps // batch
        yield {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": steps,
            "per_device_eval_batch_size": evaluated,
            "answer_batch_size": answered,
        }
    if params.eval_dtype == "float32":
        yield {"eval_dtype": "bfloat16"}
    if not params.load_in_4bit:
        yield {"load_in_4bit": True}
    length = params.max_length
    while length >= 256:
        length //= 2
        yield {"max_length": length}
