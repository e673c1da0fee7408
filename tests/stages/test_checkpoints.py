"""Checkpoints: only complete ones are used, few are kept, and a stopped run ends as an unbroken one would have."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from stages.common import checkpoints, trainer
from stages.common.checkpoints import SEAL, StopWhenAsked, last_checkpoint, remove_abandoned, seal
from stages.common.curves import loss_curves
from stages.common.errors import StageError
from stages.common.trainer import train_to_the_end
from tests.support.params import TINY_TRAINING, train_params
from tests.support.training import tiny_trainer, tokens


def test_half_written_and_damaged_checkpoints_are_skipped(tmp_path, capsys):
    for step in (2, 10, 12, 14, 16):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/optimizer.pt").write_text(f"state {step}")
        seal(tmp_path / f"checkpoint-{step}", 0.5, step)
    (tmp_path / "checkpoint-12/optimizer.pt").write_text("state 13")
    (tmp_path / "checkpoint-14" / SEAL).unlink()
    (tmp_path / "checkpoint-16" / SEAL).write_text('{"sha2')
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    said = capsys.readouterr().out.splitlines()
    assert [line.split("checkpoint-")[1] for line in said] == [
        "16: it is incomplete",
        "14: it is incomplete",
        "12: it is damaged, its files have changed",
    ]
    assert last_checkpoint(tmp_path / "none") is None
    # Otherwise they would count among the few that are kept.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]


def test_checkpoints_of_abandoned_runs_are_bounded(tmp_path):
    for age, name in enumerate(["current", "newest", "newer", "old", "oldest"]):
        (tmp_path / name / "checkpoint-2").mkdir(parents=True)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "current", (1, 1))
    remove_abandoned(tmp_path, "current")
    assert checkpoints.ABANDONED_RUNS == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "newer", "newest"]


def test_the_older_ones_go_when_the_newest_is_sealed_and_not_before(tiny_llama, monkeypatch, tmp_path):
    params = train_params(**{**TINY_TRAINING, "max_steps": 3, "save_steps": 1, "save_total_limit": 1})
    rows, tokenizer = tokens(tiny_llama, "chatml")
    there = []

    def sealing(folder, *args) -> None:
        there.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        seal(folder, *args)

    monkeypatch.setattr(trainer, "seal", sealing)
    tiny_trainer(tiny_llama, params, rows, tokenizer, tmp_path, held_out=rows[:2]).train()
    assert there == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(number, monkeypatch):
    monkeypatch.setattr(checkpoints, "REPEAT_SECONDS", 0)
    stop, control = StopWhenAsked(), SimpleNamespace(should_save=False, should_training_stop=False)
    before = signal.getsignal(number)
    with stop.listening():
        stop.on_step_end(None, None, control)
        assert not control.should_training_stop
        os.kill(os.getpid(), number)
        stop.on_step_end(None, None, control)
        assert control.should_save and control.should_training_stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            signal.pause()
    # A forwarded SIGTERM may also come after the training has ended: it is ignored.
    assert signal.getsignal(number) == (signal.SIG_IGN if number == signal.SIGTERM else before)
    signal.signal(number, before)


def test_a_terminated_group_is_one_signal_however_many_processes_forward_it():
    stop, before = StopWhenAsked(), signal.getsignal(signal.SIGTERM)
    with stop.listening():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):  # a person at a keyboard means it
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_a_stopped_training_ends_with_the_same_bits_and_curve(tiny_llama, tmp_path):
    """Also if the stop falls between two points of the curve, and in the middle of an epoch."""
    params = train_params(**{**TINY_TRAINING, "max_steps": 6, "logging_steps": 4, "save_steps": 6})
    rows, tokenizer = tokens(tiny_llama, "chatml")

    class Interrupt(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 2:  # in the middle of step 3
                os.kill(os.getpid(), signal.SIGTERM)

    def trained(folder, *callbacks):
        torch.manual_seed(1234)  # the random state before a training must not matter
        trainer = tiny_trainer(tiny_llama, params, rows, tokenizer, folder, held_out=rows[:4])
        for callback in callbacks:
            trainer.add_callback(callback)
        train_to_the_end(trainer, folder)
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        return weights, loss_curves(trainer.state.log_history)

    weights, curves = trained(tmp_path / "unbroken")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StageError, match="stopped by SIGTERM after step 3 of 6, which is saved. `dvc repro` resumes"):
        trained(tmp_path / "stopped", Interrupt())
    signal.signal(signal.SIGTERM, before)
    again, same = trained(tmp_path / "stopped")
    assert curves["train"].equals(same["train"]) and curves["validation"].equals(same["validation"])
    assert len(curves["train"]) == 1
    assert weights.keys() == again.keys() and all(torch.equal(weights[n], again[n]) for n in weights)
