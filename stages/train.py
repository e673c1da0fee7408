"""Fine-tune the base model on the conversations by QLoRA: a frozen 4-bit base, a LoRA adapter, TRL's SFTTrainer.

Reads data/tokenized/ and models/base/.
Writes models/adapter/ (LoRA weights, tokenizer, training.json with the run's parameters and counts) and
reports/loss/{train,validation}.csv (the loss curves, in nats a supervised token, also while it runs). Checkpoints are
kept in models/checkpoints/ until the adapter is written: a killed or stopped run resumes from the last one.
Run: `dvc repro train`
"""

import hashlib
import importlib.util
import shutil
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from stages.common import memory
from stages.common.adapters import add_adapter, lora_config
from stages.common.artifacts import digest_files, read_json, read_parquet, write_json, write_whole
from stages.common.checkpoints import remove_abandoned
from stages.common.curves import LiveCurves, loss_curves, write_curves
from stages.common.errors import StageError
from stages.common.halves import choosing
from stages.common.machine import Machine, check_machine, this_machine
from stages.common.masks import supervised_tokens
from stages.common.model_files import check_targets, load_config, load_tokenizer
from stages.common.models import load_model, quantization_config, torch_dtype, training_dtype
from stages.common.params import load_params
from stages.common.pipeline import code_of
from stages.common.schema import TrainParams
from stages.common.trainer import Trainer, build_trainer, train_to_the_end

BASE = Path("models/base")
TOKENIZED = Path("data/tokenized")
ADAPTER = Path("models/adapter")
LOSS = Path("reports/loss")
CHECKPOINTS = Path("models/checkpoints")
LOCK = Path("requirements.lock")
COLUMNS = ("input_ids", "assistant_masks", "length", "message_tree_id")  # what is read of a tokenised conversation


def check_memory(base: Path, params: TrainParams, machine: Machine | None = None) -> None:
    """Raise StageError when the model and its adapter alone need more memory than this machine, or its GPU, has.

    A batch needs more. That is not counted here: `make plan` estimates it.
    """
    machine = machine or this_machine()
    shape = memory.shape_of(load_config(base), lora_config(params))
    dtype = training_dtype(params.fp16, params.bf16)
    weights = memory.weight_bytes(shape, dtype, params.load_in_4bit, params.bnb_4bit_use_double_quant)
    needed = weights + memory.adapter_bytes(shape, params.optim)
    if machine.gpu is None:
        loading = memory.load_peak(shape, dtype, None, params.load_in_4bit, params.bnb_4bit_use_double_quant)
        needed, there, where = max(memory.LIBRARIES + needed, loading), machine.memory, "this machine"
    else:
        needed, there, where = memory.CUDA_CONTEXT + needed, machine.gpu, machine.gpu_name
    less = "Take" if params.load_in_4bit else "Set load_in_4bit: true, or take"
    remedy = f"{less} the small recipe (make recipe NAME=smollm2-cpu); `make plan` says what each stage needs."
    memory.check_room("the model and its adapter take", needed, there, where, remedy)


def check_logits(model: PeftModel, ids: list[int], dtype: torch.dtype) -> None:
    """Raise StageError when the logits on `ids`, computed in `dtype`, are not finite, as Phi's can be in float16."""
    mixed = torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32)
    with torch.no_grad(), torch.random.fork_rng(), mixed:
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise StageError(
            "the model's logits are not finite in this number format, before any training. "
            "Set bf16: true and fp16: false, or attn_implementation: eager."
        )


def check_tracker(name: str) -> None:
    """Raise StageError when the tracker's package is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise StageError(
            f"report_to: {name}: its package is not installed. Run .venv/bin/python -m pip install {name}, or set "
            "report_to: none."
        )


def fingerprint(params: TrainParams) -> str:
    """A name made from all inputs of a run: only a run with the same name resumes from its checkpoints."""
    files = digest_files([TOKENIZED, BASE, *code_of("train"), *([LOCK] if LOCK.exists() else [])])
    # On a CPU, the last digits of a sum depend on the number of threads.
    threads = 0 if torch.cuda.is_available() else torch.get_num_threads()
    return hashlib.sha256(f"{sorted(params.model_dump().items())} {files} {threads}".encode()).hexdigest()[:16]


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the adapter and the tokenizer into `folder`, the same bytes each time."""
    model.save_pretrained(folder)
    # PEFT holds the target modules in a set. Its order differs from process to process.
    config = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", {**config, "target_modules": sorted(config["target_modules"])})
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; merge writes the model's card
    tokenizer.save_pretrained(folder)


def kept_step(trainer: Trainer) -> int:
    """The step whose adapter is kept: the best one with load_best_model_at_end, otherwise the last."""
    best = trainer.state.best_global_step
    return int(best) if trainer.args.load_best_model_at_end and best else int(trainer.state.global_step)


def held_out_loss(curve: pd.DataFrame, step: int) -> float:
    """The held-out loss (nats a token) at `step`, or the last one before it."""
    return float(curve[curve["step"] <= step]["loss"].iloc[-1])


def main() -> None:
    params = load_params(TrainParams)
    check_machine(params.fp16, params.bf16, params.attn_implementation)
    check_targets(load_config(BASE), params.target_modules)
    check_tracker(params.report_to)
    check_memory(BASE, params)
    train, held_out = (read_parquet(TOKENIZED / f"{split}.parquet", COLUMNS) for split in ("train", "validation"))
    validation = choosing(held_out)
    tokenizer = load_tokenizer(TOKENIZED / "tokenizer")
    prepared = read_json(TOKENIZED / "params.json", ["chat_template", "system_prompt"])

    print("train: loading the base model", flush=True)
    dtype = torch_dtype(training_dtype(params.fp16, params.bf16))
    quantization = quantization_config(params, dtype)
    model = load_model(BASE, dtype, quantization=quantization, attn_implementation=params.attn_implementation)
    model = add_adapter(model, params)
    checkpoints = CHECKPOINTS / fingerprint(params)
    trainer = build_trainer(model, params, checkpoints, (train, validation), tokenizer)
    trainer.add_callback(LiveCurves(LOSS))
    check_logits(model, list(train["input_ids"][train["length"].argmax()]), dtype)
    remove_abandoned(CHECKPOINTS, checkpoints.name)
    train_to_the_end(trainer, checkpoints)

    curves = loss_curves(trainer.state.log_history)
    record = {
        "params": {**prepared, **params.model_dump()},
        "train_conversations": len(train),
        "train_supervised_tokens": supervised_tokens(train),
        "held_out_conversations": len(validation),
        "steps": trainer.state.global_step,
        "adapter_of_step": kept_step(trainer),
        "steps_skipped": trainer.skipped_steps,
        "held_out_loss_before": curves["validation"]["loss"].iloc[0],
        "held_out_loss_after": held_out_loss(curves["validation"], kept_step(trainer)),
    }
    with write_whole(ADAPTER) as folder:
        write_curves(trainer.state.log_history, LOSS)
        save_adapter(trainer.model, tokenizer, folder)
        write_json(folder / "training.json", record)
    shutil.rmtree(checkpoints, ignore_errors=True)
    if CHECKPOINTS.is_dir() and not list(CHECKPOINTS.iterdir()):
        CHECKPOINTS.rmdir()
    before, after = record["held_out_loss_before"], record["held_out_loss_after"]
    print(
        f"train: held-out loss {before:.3f} -> {after:.3f} nats a token, in {record['steps']} steps; "
        f"the adapter is that of step {record['adapter_of_step']}"
    )
    if trainer.skipped_steps:
        print(f"warning: train: {trainer.skipped_steps} steps overflowed in float16 and were skipped. Try bf16: true.")
