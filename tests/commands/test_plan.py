"""The plan: what it reports of a run here, what it refuses, and the nearest change that fits."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from commands import needs, plan
from commands.needs import Peak
from stages.common.errors import StageError
from stages.common.machine import Machine, check_machine
from stages.common.memory import GIB
from tests.support.plans import EMBEDDED, LAPTOP, REFERENCE, recorded_config
from tests.support.project import ROOT


@pytest.fixture
def phi2():
    return recorded_config("phi-2")


@pytest.fixture(autouse=True, scope="module")
def traced_once():
    """Remember what was traced: several tests plan the same model with the same parameters."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("step_bytes", "scoring_bytes"):
            patch.setattr(needs, name, remembering(getattr(needs, name)))
        yield


def remembering(function):
    known: dict[str, int] = {}

    def remembered(config, *args, **kwargs) -> int:
        key = f"{config.to_json_string()} {args} {kwargs}"
        if key not in known:
            known[key] = function(config, *args, **kwargs)
        return known[key]

    return remembered


@pytest.fixture
def in_the_project(monkeypatch, tmp_path):
    """A project's folder before any download."""
    monkeypatch.chdir(tmp_path)
    for name in ("recipes", "stages"):
        (tmp_path / name).symlink_to(ROOT / name)

    def use(recipe: str, machine: Machine, **changes) -> None:
        text = (ROOT / f"recipes/{recipe}.yaml").read_text(encoding="utf-8")
        for key, value in changes.items():
            assert f"\n{key}: " in text
            text = "\n".join(f"{key}: {value}" if li.startswith(f"{key}: ") else li for li in text.splitlines())
        Path("params.yaml").write_text(text + "\n", encoding="utf-8")
        monkeypatch.setattr(plan, "this_machine", lambda: machine)

    return use


@pytest.mark.slow
def test_the_plan_of_the_embedded_recipe_fits_a_laptop(in_the_project, capsys):
    in_the_project("smollm2-cpu", LAPTOP)
    plan.main()
    said = capsys.readouterr().out
    assert "134,515,008 in the base" in said and "TOO MUCH" not in said
    assert [line.split()[0] for line in said.splitlines() if line.endswith("fits")][:5] == [
        "load",
        "train",
        "merge",
        "evaluate",
        "export",
    ]


@pytest.mark.slow
def test_what_does_not_fit_is_said_with_the_nearest_change(in_the_project, capsys):
    in_the_project("smollm2-cpu", Machine(cores=2, memory=3 * GIB, disk=100 * GIB, gpu=None))
    nearest = "gradient_checkpointing: true, per_device_train_batch_size: "
    with pytest.raises(StageError, match=f"(?s)train: needs [45].*The nearest change that fits: {nearest}") as e:
        plan.main()
    assert "TOO MUCH: there are 3.0 GiB" in capsys.readouterr().out
    assert len(str(e.value).splitlines()) == 2


@pytest.mark.slow
def test_the_change_it_names_does_fit(in_the_project):
    machine = Machine(cores=2, memory=3 * GIB, disk=100 * GIB, gpu=None)
    in_the_project("smollm2-cpu", machine)
    with pytest.raises(StageError) as error:
        plan.main()
    changes = dict(part.split(": ") for part in str(error.value).rsplit("fits: ", 1)[1].split(", "))
    in_the_project("smollm2-cpu", machine, **changes)
    plan.main()


@pytest.mark.slow
def test_a_full_disk_is_said(in_the_project):
    in_the_project("smollm2-cpu", Machine(cores=2, memory=8 * GIB, disk=GIB // 2, gpu=None))
    with pytest.raises(StageError, match=r"disk: needs 2\.\d GiB, 0.5 are free: free 1\.\d more"):
        plan.main()


# Rules for machines, with faked capabilities ----------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch):
    """Pretend a CUDA card, with or without bfloat16."""

    def pretend(bf16: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Old Card")

    return pretend


@pytest.mark.slow
def test_on_an_old_card_the_plan_proposes_fp16(in_the_project, card):
    card(bf16=False)
    with pytest.raises(StageError, match="Old Card has no bfloat16"):
        check_machine(False, True, "sdpa")
    machine = Machine(cores=8, memory=64 * GIB, disk=500 * GIB, gpu=16 * GIB, gpu_name="Old Card")
    in_the_project("phi2-oasst1", machine, fp16="false", bf16="true")
    with pytest.raises(StageError, match="The nearest change that fits: bf16: false, fp16: true"):
        plan.main()


@pytest.mark.slow
def test_on_a_card_that_is_too_small_the_plan_proposes_less(in_the_project, card, capsys):
    card(bf16=True)
    small = Machine(cores=8, memory=64 * GIB, disk=500 * GIB, gpu=6 * GIB, gpu_name="Card")
    in_the_project("phi2-oasst1", small)
    with pytest.raises(StageError, match="train: needs .* GiB on the GPU .*, 6.0 are there") as error:
        plan.main()
    # Batches of half the size, and for evaluate's model in bfloat16, 5.2 GiB, of fewer conversations.
    assert "fits: per_device_train_batch_size: " in str(error.value)
    assert "merge" not in str(error.value)  # it turns to the CPU
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.split()[:1] == ["merge"]]
    assert line.endswith("fits")
    in_the_project("phi2-oasst1", Machine(cores=8, memory=64 * GIB, disk=500 * GIB, gpu=24 * GIB, gpu_name="Card"))
    plan.main()
    assert "GPU" in capsys.readouterr().out


def test_no_change_is_named_that_is_not_needed(phi2, monkeypatch):
    """Here only shorter conversations help: the milder changes before them are left as they are."""
    monkeypatch.setattr(
        plan, "peaks", lambda config, params, tokens: {"train": Peak(0 if params.max_length <= 256 else 9, None)}
    )
    params = REFERENCE.model_copy(update={"fp16": False})
    machine = Machine(cores=2, memory=5, disk=5, gpu=None)
    assert plan.nearest(phi2, params, machine, 1024) == ["The nearest change that fits: max_length: 256"]
    monkeypatch.setattr(plan, "peaks", lambda *_: {"train": Peak(9, None)})
    assert plan.nearest(phi2, params, machine, 1024)[0].startswith("No smaller setting of this model fits.")


def test_lengths_are_taken_of_both_splits_and_of_these_parameters_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "TOKENIZED", tmp_path)
    monkeypatch.setattr(plan, "RAW_SOURCE", tmp_path / "source.json")
    assert plan.tokenized(EMBEDDED) is None
    fetched = [{"source": EMBEDDED.dataset, "revision": None}]
    (tmp_path / "source.json").write_text(json.dumps(fetched))
    (tmp_path / "params.json").write_text(json.dumps({"max_length": EMBEDDED.max_length, "chat_template": "chatml"}))
    pd.DataFrame({"length": [10, 80, 20, 30, 50, 40, 60, 70]}).to_parquet(tmp_path / "train.parquet")
    pd.DataFrame({"length": [90, 10]}).to_parquet(tmp_path / "validation.parquet")
    found = plan.tokenized(EMBEDDED)
    # Batches of four of like lengths: 40 and 80 tokens long.
    assert found == plan.Tokenized(conversations=8, longest=90, batch=60, held_out_tokens=100)
    in_any_order = EMBEDDED.model_copy(update={"train_sampling_strategy": "random"})
    assert plan.tokenized(in_any_order).batch == 75
    assert plan.tokenized(EMBEDDED.model_copy(update={"max_length": 128})) is None
    assert plan.tokenized(EMBEDDED.model_copy(update={"chat_template": "phi2"})) is None
    # Of another data set, though everything else is the same.
    assert plan.tokenized(EMBEDDED.model_copy(update={"dataset": "file:data/local/mine.jsonl"})) is None
    (tmp_path / "source.json").write_text(json.dumps([*fetched, *fetched]))
    assert plan.tokenized(EMBEDDED) is None


@pytest.mark.slow
def test_steps_tokens_and_time_are_said_from_a_measured_batch(in_the_project, monkeypatch, capsys):
    in_the_project("smollm2-cpu", LAPTOP)
    config = json.loads((ROOT / "recipes/configs/smollm2-135m-instruct.json").read_text())["config"]
    monkeypatch.setattr(plan, "find_config", lambda *_: plan.Found(config, "models/base", 0, fetched=True))
    data = plan.Tokenized(conversations=100, longest=200, batch=150, held_out_tokens=6000)
    monkeypatch.setattr(plan, "tokenized", lambda _: data)
    monkeypatch.setattr(plan, "seconds_of_a_batch", lambda base, params, tokens: 6.0 if tokens == 150 else 1e9)
    plan.main()
    said = capsys.readouterr().out
    assert "80 steps, 320 conversations, at most 102,400 tokens" in said
    assert "3.2 passes over data/tokenized: 100 conversations, 200 tokens at most, 150 in a batch on average" in said
    # 80 batches of 6 s; three evaluations of ten batches each, of which each is a third of a step's work.
    assert "about 8 minutes of training steps, about 1 minutes of 3 evaluations, at the 6.0 s measured" in said


def test_what_does_not_fit_is_red_on_a_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert plan.red("TOO MUCH") == "\033[31mTOO MUCH\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert plan.red("TOO MUCH") == "TOO MUCH"
