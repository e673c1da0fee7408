"""TRL's SFTTrainer over tokenised conversations: its arguments, a sealed checkpoint at each save, one held-out loss,
and a loss that is computed faster on a CPU."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerState,
)
from trl import SFTConfig, SFTTrainer

from stages.common.checkpoints import RestoreLossSum, StopWhenAsked, last_checkpoint, remove_older, seal
from stages.common.errors import DISK_FULL, StageError, is_disk_full
from stages.common.fused import fuse_lora, has_plain_head, supervised_nll
from stages.common.masks import UNSUPERVISED, labels_of
from stages.common.models import torch_dtype, training_dtype
from stages.common.schema import TrainParams
from stages.common.scoring import loss_of, score


def training_arguments(params: TrainParams, output_dir: Path) -> SFTConfig:
    return SFTConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=params.per_device_train_batch_size,
        per_device_eval_batch_size=params.per_device_eval_batch_size,
        gradient_accumulation_steps=params.gradient_accumulation_steps,
        max_steps=params.max_steps or -1,  # -1: as many as num_train_epochs takes
        num_train_epochs=params.num_train_epochs or 1.0,
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
        padding_free=params.padding_free,
        logging_steps=params.logging_steps,
        save_steps=params.save_steps,
        save_total_limit=params.save_total_limit,
        eval_strategy="steps",
        eval_steps=params.eval_steps,
        eval_on_start=True,
        load_best_model_at_end=params.load_best_model_at_end,
        metric_for_best_model="eval_loss" if params.load_best_model_at_end else None,
        greater_is_better=False if params.load_best_model_at_end else None,
        neftune_noise_alpha=params.neftune_noise_alpha,
        seed=params.seed,
        use_cpu=not torch.cuda.is_available(),
        # The tokenize stage has already cut the conversations and made the masks.
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[] if params.report_to == "none" else [params.report_to],
    )


class Trainer(SFTTrainer):
    """SFTTrainer that seals its checkpoints, stops at a loss that is not finite, and whose held-out loss is that of
    `scoring.score` on `held_out`. On a CPU it computes logits of supervised tokens alone, in `dtype`."""

    def __init__(self, *args: Any, held_out: pd.DataFrame, dtype: torch.dtype, **kwargs: Any) -> None:
        self.held_out = held_out
        self.dtype = dtype
        self.skipped_steps = 0  # of the optimiser: float16's gradient scaler leaves out those that overflow
        super().__init__(*args, **kwargs)
        self.is_fast = self.args.use_cpu and has_plain_head(self.model.config)

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Write none: merge writes the model's card."""

    def _save_checkpoint(self, *args: object, **kwargs: object) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        # The trainer would remove older checkpoints before the new one is sealed: a kill in between would lose all.
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
        best = self.state.best_model_checkpoint
        remove_older(folder.parent, keep, Path(best) if best else None)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        if not self.is_fast:
            return super().compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)
        # Trainer counts the supervised tokens of all micro-batches of a step.
        with self.accelerator.autocast():
            nll = supervised_nll(model, inputs, self.dtype)
        return nll / ((inputs["labels"] != UNSUPERVISED).sum() if num_items_in_batch is None else num_items_in_batch)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise not_finite("loss", self.state.global_step + 1, self.args)
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        if not self.args.fp16 and not torch.isfinite(torch.as_tensor(norm)):
            raise not_finite("gradient", self.state.global_step + 1, self.args)
        return norm

    def evaluate(self, *_: object, **__: object) -> dict[str, float]:
        # An evaluation must not change the training after it, so the random state is restored.
        # It computes in the training's precision: accelerate has already wrapped the model's forward.
        hidden = not self.is_world_process_zero()
        batch_size, padding = self.args.per_device_eval_batch_size, self.processing_class.pad_token_id
        bar = tqdm(total=len(self.held_out), desc="held-out loss", unit="conv", leave=False, disable=hidden)
        with torch.random.fork_rng(), bar:
            scores = score(self.model, self.held_out, batch_size, padding, bar.update)
        metrics = {"eval_loss": loss_of(scores)}
        self.model.eval()  # SFTTrainer.log sorts its metrics by the model's mode
        self.log(metrics)
        self.model.train()
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Progress(ProgressCallback):
    """The trainer's progress bar, with the last losses beside the time left, instead of a line for each log."""

    shown: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for key, name in (("loss", "loss"), ("eval_loss", "held-out")):
            if logs and key in logs:
                self.shown[name] = f"{float(logs[key]):.3f}"
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown)


def not_finite(what: str, step: int, args: SFTConfig) -> StageError:
    """The error of a training that has diverged. Its last checkpoint stays."""
    instead = "bf16: true and fp16: false, or " if args.fp16 else ""
    return StageError(
        f"the {what} of step {step} is not finite; the last checkpoint before it is kept. Set {instead}a lower "
        f"learning_rate (now {args.learning_rate:g}) or max_grad_norm, and run `dvc repro`."
    )


class CountSkippedSteps(TrainerCallback):
    """Count the steps that float16's gradient scaler left out."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.skipped_steps += bool(self.trainer.accelerator.optimizer_step_was_skipped)


def build_trainer(
    model: PeftModel,
    params: TrainParams,
    output_dir: Path,
    tables: tuple[pd.DataFrame, pd.DataFrame],
    tokenizer: PreTrainedTokenizerBase,
) -> Trainer:
    """The trainer of a model with its adapter over `tables` of tokenised conversations (train, held out), with TRL's
    collator."""
    train, validation = tables
    dtype = torch_dtype(training_dtype(params.fp16, params.bf16))
    trainer = Trainer(
        model=model,
        args=training_arguments(params, output_dir),
        train_dataset=to_dataset(train),
        eval_dataset=to_dataset(validation),
        processing_class=tokenizer,
        held_out=validation,
        dtype=dtype,
    )
    if trainer.args.use_cpu:
        fuse_lora(trainer.model, dtype, params.dequantize_once)
    # SFTTrainer casts the adapter of a 4-bit model to bfloat16. Under float16 its scaler would then fail, and small
    # late updates would be rounded away: the trained weights stay float32 in every precision.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Progress())
    trainer.add_callback(CountSkippedSteps(trainer))
    if params.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(params.early_stopping_patience))
    return trainer


def to_dataset(rows: pd.DataFrame) -> Dataset:
    """Tokenised conversations as the Dataset TRL's collator takes: input_ids, labels, length."""
    pairs = zip(rows["input_ids"], rows["assistant_masks"], strict=True)
    labels = [labels_of(ids, mask) for ids, mask in pairs]
    return Dataset.from_dict({"input_ids": list(rows["input_ids"]), "labels": labels, "length": list(rows["length"])})


def restore_patience(trainer: Trainer, state: TrainerState) -> bool:
    """Give early stopping the count that a checkpoint recorded; returns whether it had asked for the end."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            recorded: Any = state.stateful_callbacks.get("EarlyStoppingCallback", {})
            callback.early_stopping_patience_counter = recorded["attributes"]["early_stopping_patience_counter"]
            return callback.early_stopping_patience_counter >= callback.early_stopping_patience
    return False


def resume(trainer: Trainer, checkpoint: Path) -> None:
    """Continue the training from a checkpoint; if it had reached the end, only load the weights that are kept."""
    try:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        patience_over = restore_patience(trainer, state)
        if state.global_step >= state.max_steps or patience_over:
            trainer._load_from_checkpoint(state.best_model_checkpoint or str(checkpoint))
            trainer.state = state
            return
        trainer.args.eval_on_start = False  # the checkpoint's log has that evaluation
        trainer.add_callback(RestoreLossSum(trainer, checkpoint))
        trainer.train(resume_from_checkpoint=str(checkpoint))
    except Exception as error:  # torch raises pickle's own error, and this project never imports pickle
        if "Weights only load failed" not in str(error):
            raise
        raise StageError(
            f"{checkpoint} holds no training state, and was not loaded. Delete it and run `dvc repro`."
        ) from None


def train_to_the_end(trainer: Trainer, checkpoints: Path) -> None:
    """Train, from the last checkpoint if there is one. Raises StageError when a signal asked for an earlier end."""
    stop = StopWhenAsked()
    trainer.add_callback(stop)
    with stop.listening():
        last = last_checkpoint(checkpoints)
        if last is None:
            trainer.train()
        else:
            print(f"train: resuming from {last}", flush=True)
            resume(trainer, last)
    done, wanted = trainer.state.global_step, trainer.state.max_steps
    if stop.asked and done < wanted:
        raise StageError(
            f"stopped by {stop.asked} after step {done} of {wanted}, which is saved. `dvc repro` resumes from there."
        )
