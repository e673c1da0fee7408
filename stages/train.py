"""Fine-tune the base model on the conversations by QLoRA: a frozen 4-bit base, a LoRA adapter, TRL's SFTTrainer.

Reads data/tokenized/ and models/base/.
Writes models/adapter/ (LoRA weights, tokenizer, training.json with all that shaped the run) and
reports/loss/{train,validation}.csv (the loss curves, in nats a supervised token). Checkpoints are kept in
models/checkpoints/ until the adapter is done: a killed or stopped run goes on from the last one. Run: `dvc repro train`
"""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pandas as pd

from stages.common import memory
from stages.common.artifacts import digest_files, read_json, read_parquet, write_json, write_whole
from stages.common.errors import DISK_FULL, StageError, is_disk_full, run_stage
from stages.common.machine import Machine, this_machine
from stages.common.models import check_targets, load_config, load_model, load_tokenizer, quantization_config
from stages.common.params import load_params
from stages.common.scoring import score

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel
    from trl import SFTConfig, SFTTrainer

BASE = Path("models/base")
TOKENIZED = Path("data/tokenized")
ADAPTER = Path("models/adapter")
LOSS = Path("reports/loss")
CHECKPOINTS = Path("models/checkpoints")
CODE = [Path("stages") / name for name in ("train.py", "checkpoints.py", "common/models.py", "common/scoring.py")]
LOCK = Path("requirements.lock")
COLUMNS = ("input_ids", "assistant_masks", "length")  # what is read of a tokenised conversation


def compute_dtype(fp16: bool, bf16: bool) -> "torch.dtype":
    """The number format of matrix products: float16, bfloat16, or float32 when neither is asked for."""
    import torch

    return torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32


def check_machine(fp16: bool, bf16: bool, attn_implementation: str) -> None:
    """Raise StageError when this machine cannot train as the parameters ask."""
    from importlib.util import find_spec

    import torch

    flash = "attn_implementation: flash_attention_2"
    if not torch.cuda.is_available():
        if fp16:
            raise StageError(
                "fp16: true: needs a CUDA GPU, and this machine shows none. "
                "Set fp16: false (float32), or take the CPU recipe: make recipe NAME=smollm2-cpu"
            )
        if attn_implementation == "flash_attention_2":
            raise StageError(f"{flash} needs a CUDA GPU. Set it to sdpa.")
    elif bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise StageError(f"bf16: true: {torch.cuda.get_device_name()} has no bfloat16. Set bf16: false and fp16: true.")
    elif attn_implementation == "flash_attention_2":
        if not (fp16 or bf16):
            raise StageError(f"{flash} computes in 16 bits only. Set bf16: true or fp16: true, or sdpa.")
        if find_spec("flash_attn") is None:
            raise StageError(f"{flash} needs the package flash-attn. Install it (pip install flash-attn), or set sdpa.")


def check_memory(base: Path, params: SimpleNamespace, machine: Machine | None = None) -> None:
    """Raise StageError when the model and its adapter alone are more than this machine, or its GPU, can hold.

    Reads `target_modules`, `lora_r`, `optim`, `load_in_4bit`, `bnb_4bit_use_double_quant`, `fp16` and `bf16` of
    `params`. What a batch takes besides is not counted: `make plan` estimates it.
    """
    machine = machine or this_machine()
    shape = memory.shape_of(load_config(base), params.target_modules, params.lora_r)
    dtype = "float16" if params.fp16 else "bfloat16" if params.bf16 else "float32"
    weights = memory.weight_bytes(shape, dtype, params.load_in_4bit, params.bnb_4bit_use_double_quant)
    needed = weights + memory.adapter_bytes(shape, params.optim)
    if machine.gpu is None:
        loading = memory.load_peak(shape, dtype, None, params.load_in_4bit, params.bnb_4bit_use_double_quant)
        needed, there, where = max(memory.LIBRARIES + needed, loading), machine.memory, "this machine"
    else:
        needed, there, where = memory.CUDA_CONTEXT + needed, machine.gpu, machine.gpu_name
    less = "Take" if params.load_in_4bit else "Set load_in_4bit: true, or take"
    mend = f"{less} the small recipe (make recipe NAME=smollm2-cpu); `make plan` says what each stage needs."
    memory.check_room("the model and its adapter take", needed, there, where, mend)


def lora_config(params: SimpleNamespace) -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig(
        r=params.lora_r,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        target_modules=params.target_modules,
        bias="none",
        task_type="CAUSAL_LM",
    )


def training_arguments(params: SimpleNamespace, output_dir: Path) -> "SFTConfig":
    import torch
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=params.per_device_train_batch_size,
        per_device_eval_batch_size=params.per_device_eval_batch_size,
        gradient_accumulation_steps=params.gradient_accumulation_steps,
        max_steps=params.max_steps,
        optim=params.optim,
        learning_rate=params.learning_rate,
        lr_scheduler_type=params.lr_scheduler_type,
        warmup_steps=params.warmup_ratio,  # below 1 it is a share of max_steps
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        fp16=params.fp16,
        bf16=params.bf16,
        gradient_checkpointing=params.gradient_checkpointing,
        train_sampling_strategy=params.train_sampling_strategy,
        logging_steps=params.logging_steps,
        save_steps=params.save_steps,
        save_total_limit=params.save_total_limit,
        eval_strategy="steps",
        eval_steps=params.eval_steps,
        eval_on_start=True,
        seed=params.seed,
        use_cpu=not torch.cuda.is_available(),
        # The tokenize stage has cut the conversations and built the masks: nothing is left to prepare.
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
    )


def add_adapter(model: "PreTrainedModel", params: SimpleNamespace) -> "PeftModel":
    """Freeze `model` and put new LoRA matrices, in float32, on its target modules.

    Raises StageError, naming what would fit, when a target module is none of the model's linear layers.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import set_seed

    if params.load_in_4bit:
        # Norms and output layer in float32 under 16-bit training. The trainer turns on checkpointing itself.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    set_seed(params.seed)
    return get_peft_model(model, lora_config(params))


def check_logits(model: "PeftModel", ids: list[int], dtype: "torch.dtype") -> None:
    """Raise StageError when the logits on `ids`, computed in `dtype`, are not finite, as Phi's can be in float16."""
    import torch

    mixed = torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32)
    with torch.no_grad(), torch.random.fork_rng(), mixed:
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise StageError(
            "the model's logits are not finite in this number format, before any training. "
            "Set bf16: true and fp16: false, or attn_implementation: eager."
        )


def build_trainer(
    model: "PeftModel", args: "SFTConfig", train: pd.DataFrame, validation: pd.DataFrame, tokenizer: Any
) -> "SFTTrainer":
    """TRL's SFTTrainer over tokenised conversations, with its collator; its held-out loss is `scoring.score`'s."""
    import torch
    from tqdm.auto import tqdm
    from transformers import PrinterCallback, ProgressCallback
    from trl import SFTTrainer

    from stages.checkpoints import remove_older, seal

    class Trainer(SFTTrainer):
        def create_model_card(self, *args: object, **kwargs: object) -> None:
            """None beside the checkpoints: merge writes a true one."""

        def _save_checkpoint(self, *args: object, **kwargs: object) -> None:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            # The trainer would remove the older ones before the new one is sealed: a kill in between would lose all.
            keep, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                super()._save_checkpoint(*args, **kwargs)
                seal(folder, self._tr_loss.item(), self._globalstep_last_logged)
            except BaseException as error:
                shutil.rmtree(folder, ignore_errors=True)
                if is_disk_full(error):
                    raise StageError(f"{folder}: {DISK_FULL}") from error
                raise
            finally:
                self.args.save_total_limit = keep
            remove_older(folder.parent, keep)

        def evaluate(self, *_: object, **__: object) -> dict[str, float]:
            # Evaluating must not change the training after it: whatever it draws, the random state is put back.
            # It computes in the training's precision, since accelerate has wrapped the model's forward by now.
            with torch.random.fork_rng():
                hide = not self.is_world_process_zero()
                with tqdm(total=len(validation), desc="held-out loss", unit="conv", leave=False, disable=hide) as bar:
                    scores = score(
                        self.model, validation, args.per_device_eval_batch_size, tokenizer.pad_token_id, bar.update
                    )
            metrics = {"eval_loss": scores["nll"].sum() / scores["tokens"].sum()}
            self.model.eval()  # SFTTrainer.log sorts its metrics by the model's mode
            self.log(metrics)
            self.model.train()
            self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    class Progress(ProgressCallback):
        """The trainer's bar with the last losses beside the time left, instead of a line for each log."""

        shown: dict[str, str] = {}

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            for key, name in (("loss", "loss"), ("eval_loss", "held-out")):
                if logs and key in logs:
                    self.shown[name] = f"{float(logs[key]):.3f}"
            if self.training_bar is not None:
                self.training_bar.set_postfix(self.shown)

    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=to_dataset(train),
        eval_dataset=to_dataset(validation),
        processing_class=tokenizer,
    )
    # SFTTrainer casts the adapter of a 4-bit model to bfloat16. Under float16 its scaler would then fail, and small
    # late updates would be rounded away: the trained weights stay float32 in every precision.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Progress())
    return trainer


def to_dataset(rows: pd.DataFrame) -> Any:
    """Tokenised conversations as the Dataset TRL's collator takes: input_ids, labels (-100: unsupervised), length."""
    from datasets import Dataset

    labels = [
        [token if wanted else -100 for token, wanted in zip(ids, mask, strict=True)]
        for ids, mask in zip(rows["input_ids"], rows["assistant_masks"], strict=True)
    ]
    return Dataset.from_dict({"input_ids": list(rows["input_ids"]), "labels": labels, "length": list(rows["length"])})


def loss_curves(log_history: list[dict[str, Any]]) -> dict[str, pd.DataFrame]:
    """The trainer's log as a table a split: step, loss (nats a supervised token) and, in train, learning rate."""
    train = [(e["step"], round(e["loss"], 6), e["learning_rate"]) for e in log_history if "loss" in e]
    held_out = [(e["step"], round(e["eval_loss"], 6)) for e in log_history if "eval_loss" in e]
    return {
        "train": pd.DataFrame(train, columns=["step", "loss", "learning_rate"]),
        "validation": pd.DataFrame(held_out, columns=["step", "loss"]),
    }


def fingerprint(params: SimpleNamespace) -> str:
    """A name for all that shapes a run: a checkpoint is only ever resumed by a run with the same one."""
    import hashlib

    import torch

    files = digest_files([TOKENIZED, BASE, *CODE, *([LOCK] if LOCK.exists() else [])])
    # On a CPU sums depend on how many threads add them up.
    threads = 0 if torch.cuda.is_available() else torch.get_num_threads()
    return hashlib.sha256(f"{sorted(vars(params).items())} {files} {threads}".encode()).hexdigest()[:16]


def resume(trainer: "SFTTrainer", checkpoint: Path) -> None:
    """Train on from a checkpoint; if its training had reached the end, only load what it had learnt."""
    from transformers import TrainerState

    from stages.checkpoints import RestoreLossSum

    try:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step >= trainer.args.max_steps:
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = state
            return
        trainer.args.eval_on_start = False  # the checkpoint's log has that
        trainer.add_callback(RestoreLossSum(trainer, checkpoint))
        trainer.train(resume_from_checkpoint=str(checkpoint))
    except Exception as error:  # torch raises pickle's own, and pickle is imported nowhere here
        if "Weights only load failed" not in str(error):
            raise
        raise StageError(
            f"{checkpoint} holds what is no training state, and was not loaded. Delete it and run `dvc repro`."
        ) from None


def train_to_the_end(trainer: "SFTTrainer", checkpoints: Path) -> None:
    """Train, from the last checkpoint if there is one. Raises StageError when a signal asked for an earlier end."""
    from stages.checkpoints import StopWhenAsked, last_checkpoint

    stop = StopWhenAsked()
    trainer.add_callback(stop)
    with stop.listening():
        last = last_checkpoint(checkpoints)
        if last is None:
            trainer.train()
        else:
            print(f"train: going on from {last}", flush=True)
            resume(trainer, last)
    done, wanted = trainer.state.global_step, trainer.args.max_steps
    if stop.asked and done < wanted:
        raise StageError(
            f"stopped by {stop.asked} after step {done} of {wanted}, which is saved. `dvc repro` goes on from there."
        )


def main() -> None:
    from stages.checkpoints import remove_abandoned

    params = load_params("train")
    check_machine(params.fp16, params.bf16, params.attn_implementation)
    check_targets(load_config(BASE), params.target_modules)
    check_memory(BASE, params)
    train, validation = (read_parquet(TOKENIZED / f"{split}.parquet", COLUMNS) for split in ("train", "validation"))
    tokenizer = load_tokenizer(TOKENIZED / "tokenizer")
    prepared = read_json(TOKENIZED / "params.json", ["chat_template", "system_prompt"])

    dtype = compute_dtype(params.fp16, params.bf16)
    quantization = (
        quantization_config(params.bnb_4bit_quant_type, params.bnb_4bit_use_double_quant, dtype)
        if params.load_in_4bit
        else None
    )
    print("train: loading the base model", flush=True)
    model = load_model(BASE, dtype, quantization=quantization, attn_implementation=params.attn_implementation)
    model = add_adapter(model, params)
    checkpoints = CHECKPOINTS / fingerprint(params)
    trainer = build_trainer(model, training_arguments(params, checkpoints), train, validation, tokenizer)
    check_logits(model, list(train["input_ids"][train["length"].argmax()]), dtype)
    remove_abandoned(CHECKPOINTS, checkpoints.name)
    train_to_the_end(trainer, checkpoints)

    curves = loss_curves(trainer.state.log_history)
    record = {
        "params": {**prepared, **vars(params)},
        "train_conversations": len(train),
        "train_supervised_tokens": int(sum(sum(mask) for mask in train["assistant_masks"])),
        "held_out_conversations": len(validation),
        "held_out_loss_before": curves["validation"]["loss"].iloc[0],
        "held_out_loss_after": curves["validation"]["loss"].iloc[-1],
    }
    with write_whole(LOSS) as curves_folder, write_whole(ADAPTER) as folder:
        curves_folder.mkdir()
        for split, curve in curves.items():
            curve.to_csv(curves_folder / f"{split}.csv", index=False)
        trainer.model.save_pretrained(folder)
        # PEFT holds the target modules in a set, whose order is another in every process.
        config = read_json(folder / "adapter_config.json")
        write_json(folder / "adapter_config.json", {**config, "target_modules": sorted(config["target_modules"])})
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; merge writes a true one
        tokenizer.save_pretrained(folder)
        write_json(folder / "training.json", record)
    shutil.rmtree(checkpoints, ignore_errors=True)
    if CHECKPOINTS.is_dir() and not list(CHECKPOINTS.iterdir()):
        CHECKPOINTS.rmdir()
    before, after = record["held_out_loss_before"], record["held_out_loss_after"]
    print(f"train: held-out loss {before:.3f} -> {after:.3f} nats a token, in {params.max_steps} steps")


if __name__ == "__main__":
    run_stage(main, one_at_a_time=True)
