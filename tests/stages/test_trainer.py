"""What people expect of a trainer: the best checkpoint, early stopping, passes, a stop at a loss that is not finite."""

import os
import signal

import pytest
import torch
from transformers import TrainerCallback

from stages.common import trainer as module
from stages.common.curves import LiveCurves, loss_curves
from stages.common.errors import StageError
from stages.common.trainer import train_to_the_end
from stages.train import check_tracker, kept_step
from tests.support.params import TINY_TRAINING, train_params
from tests.support.training import tiny_trainer, tokens

BEST = {**TINY_TRAINING, "max_steps": 8, "save_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True}


class At(TrainerCallback):
    """Does something at the beginning of a step (1, 2, …)."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.do(model)


class Remember(TrainerCallback):
    """Keeps a copy of the weights after each step."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = weights(model)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(ours, theirs) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def trained(base, params, folder, *callbacks):
    rows, tokenizer = tokens(base, "chatml")
    trainer = tiny_trainer(base, params, rows, tokenizer, folder, held_out=rows[:4])
    for callback in callbacks:
        trainer.add_callback(callback)
    train_to_the_end(trainer, folder)
    return trainer


@pytest.fixture
def third_is_best(monkeypatch):
    """Held-out losses by step, instead of measured ones."""
    losses = {0: 9.0, 1: 5.0, 2: 4.0, 3: 2.0, 4: 3.0, 5: 4.0, 6: 5.0, 7: 6.0, 8: 7.0}
    evaluate = module.Trainer.evaluate

    def scripted(self, *args, **kwargs):
        monkeypatch.setattr(module, "loss_of", lambda scores: losses[self.state.global_step])
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(module.Trainer, "evaluate", scripted)


def test_the_best_adapter_is_kept_though_only_one_other_checkpoint_is(third_is_best, tiny_llama, tmp_path):
    seen = Remember()
    trainer = trained(tiny_llama, train_params(**BEST), tmp_path / "run", seen)
    assert trainer.state.global_step == 8 and kept_step(trainer) == 3
    assert same(weights(trainer.model), seen.after[3]) and not same(seen.after[3], seen.after[8])
    last = trained(tiny_llama, train_params(**{**BEST, "load_best_model_at_end": False}), tmp_path / "last")
    assert kept_step(last) == 8 and same(weights(last.model), seen.after[8])


@pytest.mark.slow
@pytest.mark.parametrize("stopped_in", [2, 4, 5])
def test_early_stopping_and_the_best_adapter_survive_a_stop(stopped_in, third_is_best, tiny_llama, tmp_path):
    """Stopped before the best step, behind it, and in the step whose measurement ends the patience."""
    params = train_params(**BEST, early_stopping_patience=2)
    unbroken = trained(tiny_llama, params, tmp_path / "unbroken")
    assert unbroken.state.global_step == 5 and kept_step(unbroken) == 3
    before = signal.getsignal(signal.SIGTERM)
    stop = At(stopped_in, lambda model: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StageError, match=f"stopped by SIGTERM after step {stopped_in} of 8"):
        trained(tiny_llama, params, tmp_path / "stopped", stop)
    signal.signal(signal.SIGTERM, before)
    resumed = trained(tiny_llama, params, tmp_path / "stopped")
    assert resumed.state.global_step == 5 and kept_step(resumed) == 3
    assert same(weights(resumed.model), weights(unbroken.model))
    for split, curve in loss_curves(unbroken.state.log_history).items():
        assert curve.equals(loss_curves(resumed.state.log_history)[split])


def test_passes_instead_of_steps(tiny_llama, tmp_path):
    """12 conversations, 4 in a step."""
    params = train_params(**{**TINY_TRAINING, "max_steps": None}, num_train_epochs=1.5)
    trainer = trained(tiny_llama, params, tmp_path)
    assert trainer.state.global_step == trainer.state.max_steps == 5  # 4.5, rounded up


def test_a_loss_that_is_not_finite_stops_at_once_and_keeps_the_last_checkpoint(tiny_llama, tmp_path):
    def break_a_weight(model):
        next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    params = train_params(**{**TINY_TRAINING, "save_steps": 1})
    with pytest.raises(StageError, match=r"the loss of step 3 is not finite.*lower learning_rate \(now 0.01\)"):
        trained(tiny_llama, params, tmp_path, At(3, break_a_weight))
    assert (tmp_path / "checkpoint-2/seal.json").exists() and not (tmp_path / "checkpoint-3").exists()


def test_a_gradient_that_is_not_finite_stops_before_it_is_used(tiny_llama, tmp_path):
    def break_a_gradient(model):
        parameter = next(p for p in model.parameters() if p.requires_grad)
        parameter.register_hook(lambda grad: grad * float("inf"))

    with pytest.raises(StageError, match="the gradient of step 2 is not finite"):
        trained(tiny_llama, train_params(**{**TINY_TRAINING, "save_steps": 1}), tmp_path, At(2, break_a_gradient))
    assert (tmp_path / "checkpoint-1/seal.json").exists() and not (tmp_path / "checkpoint-2").exists()


def test_steps_that_float16_skips_are_counted(tiny_llama, tmp_path, monkeypatch):
    rows, tokenizer = tokens(tiny_llama, "chatml")
    trainer = tiny_trainer(tiny_llama, train_params(**TINY_TRAINING), rows, tokenizer, tmp_path, held_out=rows[:4])

    counted = next(c for c in trainer.callback_handler.callbacks if isinstance(c, module.CountSkippedSteps))
    for skipped in (True, False, True):
        monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", skipped)
        counted.on_step_end()
    assert trainer.skipped_steps == 2


@pytest.mark.slow
@pytest.mark.parametrize("batch, accumulation", [(2, 2), (1, 4)])
def test_accumulation_changes_no_loss(batch, accumulation, tiny_llama, tmp_path):
    sequential = {**TINY_TRAINING, "train_sampling_strategy": "sequential", "lora_dropout": 0.0}
    shapes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    at_once = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    curves = [
        loss_curves(trained(tiny_llama, train_params(**{**sequential, **shape}), tmp_path / str(i)).state.log_history)
        for i, shape in enumerate((at_once, shapes))
    ]
    assert curves[0]["train"]["loss"].tolist() == pytest.approx(curves[1]["train"]["loss"].tolist(), abs=1e-5)


@pytest.mark.parametrize("name, template", [("llama", "chatml"), ("phi", "phi2")])
def test_one_row_without_padding_gives_the_same_losses(name, template, request, tmp_path):
    folder = request.getfixturevalue(f"tiny_{name}")
    rows, tokenizer = tokens(folder, template)
    modules = {"llama": ["q_proj", "up_proj"], "phi": ["q_proj", "fc1"]}[name]
    curves = []
    for padding_free in (False, True):
        values = {**TINY_TRAINING, "target_modules": modules, "lora_dropout": 0.0, "padding_free": padding_free}
        values |= {"train_sampling_strategy": "random"}  # lengths differ in a batch
        trainer = tiny_trainer(folder, train_params(**values), rows, tokenizer, tmp_path / str(padding_free))
        train_to_the_end(trainer, tmp_path / str(padding_free))
        curves.append(loss_curves(trainer.state.log_history)["train"]["loss"].tolist())
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


VARIANTS = {"use_dora": True, "use_rslora": True, "init_lora_weights": "gaussian", "neftune_noise_alpha": 5.0}


@pytest.mark.parametrize("key", VARIANTS)
def test_variants_of_lora_train(key, tiny_llama, tmp_path):
    losses = []
    for number, more in enumerate(({}, {key: VARIANTS[key]})):
        trainer = trained(tiny_llama, train_params(**TINY_TRAINING, **more), tmp_path / str(number))
        losses.append(loss_curves(trainer.state.log_history)["train"]["loss"].tolist())
    assert losses[0] != losses[1] and min(losses[1][1:]) < losses[1][0]


def test_the_curves_are_there_while_the_training_goes_on(tiny_llama, tmp_path):
    seen = []

    def look(model):
        seen.append(
            [len((tmp_path / f"loss/{split}.csv").read_text().splitlines()) for split in ("train", "validation")]
        )

    params = train_params(**TINY_TRAINING)
    trained(tiny_llama, params, tmp_path / "run", LiveCurves(tmp_path / "loss"), At(2, look), At(4, look))
    assert seen == [[2, 3], [4, 5]]  # with the line of names, and the measurement before the first step


def test_a_tracker_that_is_not_installed_is_one_line():
    check_tracker("none")
    with pytest.raises(StageError, match="report_to: trackio: .* Run .* pip install trackio"):
        check_tracker("trackio")
