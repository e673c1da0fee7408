"""The plan: exact counts, memory by hand and against real tensors, refusals, the nearest change that fits."""

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_train import train_params

from commands import plan
from stages.common import memory
from stages.common.errors import StageError
from stages.common.machine import Machine
from stages.common.memory import GIB, LiveBytes, Shape
from stages.common.model_files import linear_layers
from stages.common.params import read_params
from stages.train import add_adapter, build_trainer, check_machine, check_memory, training_arguments
from tests.support.project import ROOT

CONFIGS = sorted((ROOT / "recipes/configs").glob("*.json"))
REFERENCE = read_params(ROOT / "recipes/phi2-oasst1.yaml")
EMBEDDED = read_params(ROOT / "recipes/smollm2-cpu.yaml")
PHI2 = json.loads((ROOT / "recipes/configs/phi-2.json").read_text(encoding="utf-8"))["config"]
LAPTOP = Machine(cores=2, memory=8 * GIB, disk=100 * GIB, gpu=None)


@pytest.fixture(scope="module")
def phi2():
    return plan.configuration(PHI2)


def test_every_recipe_has_its_models_configuration_beside_it():
    known = {(c["base_model"], c["base_model_revision"]) for c in (json.loads(p.read_text()) for p in CONFIGS)}
    assert {(p.base_model, p.base_model_revision) for p in (REFERENCE, EMBEDDED)} == known


def test_phi2_is_counted_to_the_last_weight(phi2):
    shape = memory.shape_of(phi2, REFERENCE.target_modules, 16)
    # Embedding and output layer with its bias; in each of 32 layers four projections and an MLP, all with biases, and a
    # norm; a last norm.
    layer = 4 * (2560 * 2560 + 2560) + 2560 * 10240 + 10240 + 10240 * 2560 + 2560 + 2 * 2560
    assert shape.parameters == 51200 * 2560 + 51200 * 2560 + 51200 + 32 * layer + 2 * 2560 == 2_779_683_840
    assert shape.quantised == 32 * (4 * 2560 * 2560 + 2 * 2560 * 10240)
    assert shape.largest_linear == 2560 * 10240
    assert shape.adapter == 32 * 4 * 16 * (2560 + 2560)  # q_proj, k_proj, v_proj, dense


def test_gpu_weights_by_hand():
    shape = Shape(parameters=1_000_000, quantised=640_000, largest_linear=64_000, adapter=10_000)
    # 4 bits each, a byte for 64 of them, four bytes for 256 of those; the other 360,000 in float32.
    double = 320_000 + 10_000 + 10_000 / 256 * 4
    assert memory.weight_bytes(shape, "float16", True, True) == round(double) + 1_440_000
    assert memory.weight_bytes(shape, "float16", True, False) == 320_000 + 40_000 + 1_440_000
    assert memory.weight_bytes(shape, "float16", False, False) == 2_000_000
    assert memory.weight_bytes(shape, "float32", False, False) == 4_000_000
    # Weight, gradient and two moments of AdamW, in float32; 8-bit moments are a byte each.
    assert memory.adapter_bytes(shape, "paged_adamw_32bit") == 160_000
    assert memory.adapter_bytes(shape, "paged_adamw_8bit") == 100_000


def test_phi2_on_a_gpu_by_hand(phi2, monkeypatch):
    monkeypatch.setattr(memory, "step_bytes", lambda *_, **__: 3 * GIB)
    monkeypatch.setattr(memory, "scoring_bytes", lambda *_: 2 * GIB)
    others = 2_779_683_840 - 2_516_582_400
    weights = others * 4 + 2_516_582_400 / 2 + 2_516_582_400 / 64 * (1 + 4 / 256)
    expected = 0.6 * GIB + weights + 10_485_760 * 16 + 3 * GIB + 2560 * 10240 * 2
    assert plan.peaks(phi2, REFERENCE, 1024)["train"].gpu == pytest.approx(expected, abs=4)


def test_live_bytes_are_those_of_storages_that_live():
    live = LiveBytes()
    with live.mode:
        a = torch.zeros(1000, dtype=torch.float32)  # 4000
        b = a + 1  # 8000
        view = b[:10]
        del a, b  # 4000: the view keeps its storage
        c = torch.cat([view, view])  # 4080
        assert live.now == 4080
        del view
        assert live.now == 80
        del c
    assert (live.now, live.peak) == (0, 8000)


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_phi"])
@pytest.mark.slow
def test_a_traced_step_holds_what_a_real_one_does(model, checkpointed, mixed, request, monkeypatch, tmp_path):
    """A step of SFTTrainer itself, over real tensors and all layers: the trace extends two and four."""
    import trl.trainer.utils
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # So narrow that the output layer's buffer, of a fixed width, does not hide all else.
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 64)
    recipe = {"tiny_llama": "smollm2-cpu", "tiny_phi": "phi2-oasst1"}[model]
    settings = {"target_modules": ["q_proj", "v_proj"], "lora_r": 4, "lora_dropout": 0.1}
    changes = {"fp16": False, "bf16": mixed, "load_in_4bit": False, "gradient_checkpointing": checkpointed}
    params = train_params(recipe, monkeypatch, **settings, **changes)
    folder = request.getfixturevalue(model)
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = 7
    traced = memory.step_bytes(
        config, **settings, gradient_checkpointing=checkpointed, batch_size=2, tokens=40, mixed_precision=mixed
    )
    network = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if mixed:
        for layer in linear_layers(network).values():
            layer.to(torch.bfloat16)
    rows = pd.DataFrame({"input_ids": [[5] * 40] * 2, "assistant_masks": [[1] * 40] * 2, "length": [40, 40]})
    args, tokenizer = training_arguments(params, tmp_path), AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token_id = 1
    trainer = build_trainer(add_adapter(network, params), args, rows, rows, tokenizer)
    wrapped = trainer.accelerator.prepare(trainer.model)
    if checkpointed:
        wrapped.gradient_checkpointing_enable()
        wrapped.enable_input_require_grads()
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(2)]))
    live = LiveBytes()
    live.ignore([*wrapped.parameters(), *wrapped.buffers(), *batch.values()])
    trainer.current_gradient_accumulation_steps = 1
    with live.mode:
        trainer.training_step(wrapped, batch)
    assert traced == pytest.approx(live.peak, rel=0.1)


@pytest.mark.slow
def test_a_step_by_hand(phi2):
    """Two parts of a step that can be worked out on paper, at phi-2's width and vocabulary."""
    import trl.trainer.utils

    batch, tokens = 2, 128
    settings = {"target_modules": ["q_proj"], "lora_r": 1, "lora_dropout": 0.0, "gradient_checkpointing": True}

    def step(layers: int, **more) -> int:
        phi2.num_hidden_layers = layers
        return memory.step_bytes(phi2, **settings, batch_size=batch, tokens=tokens, mixed_precision=False, **more)

    try:
        few, many, on_gpu = step(8), step(24), step(8, on_gpu=True)
    finally:
        phi2.num_hidden_layers = 32
    # With recomputed activations a layer keeps what goes into it: a float32 for each token and dimension.
    adapters = 16 * 2 * 2560 * 4  # and the gradients of its LoRA matrices of rank 1
    assert many - few == pytest.approx(16 * batch * tokens * 2560 * 4 + adapters, rel=0.1)
    # Logits are never there as a whole, but in tiles of some thousand tokens of the vocabulary, several at a time: the
    # products, their exponentials, the gradient, masks. The fused kernels of a GPU work in one tile, in place.
    width = trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
    tile = batch * tokens * width * 4
    kept = 8 * batch * tokens * 2560 * 4  # into each of the eight layers
    one_layer = 25 * batch * tokens * 2560 * 4  # computed again: its MLP is four times as wide
    assert kept + 4 * tile < few < kept + one_layer + 10 * tile
    assert kept + tile < on_gpu < few - 3 * tile


@pytest.mark.slow
def test_less_is_planned_for_less(phi2):
    def step(**changes):
        settings = {"target_modules": ["q_proj"], "lora_r": 16, "lora_dropout": 0.05, "batch_size": 4, "tokens": 256}
        return memory.step_bytes(
            phi2, **{**settings, "gradient_checkpointing": False, "mixed_precision": False, **changes}
        )

    checkpointed, mixed, plain = (
        step(mixed_precision=True, gradient_checkpointing=True),
        step(mixed_precision=True),
        step(),
    )
    assert 3 * checkpointed < mixed < 0.7 * plain
    assert step(batch_size=2) < 0.6 * plain
    assert memory.scoring_bytes(phi2, 4, 256) < 0.6 * memory.scoring_bytes(phi2, 8, 256)


@pytest.mark.slow
def test_the_plans_of_the_measured_runs_are_within_15_percent(phi2):
    """Peaks in GiB that `python -m bench.plan` and `python -m bench.phi2_full_size` measured; see README.md."""
    smollm2 = plan.configuration(
        json.loads((ROOT / "recipes/configs/smollm2-135m-instruct.json").read_text())["config"]
    )
    assert plan.peaks(smollm2, EMBEDDED, 255)["train"].cpu / GIB == pytest.approx(5.67, rel=0.15)
    full_size = REFERENCE.model_copy(
        update={"fp16": False, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "max_length": 256}
    )
    assert plan.peaks(phi2, full_size, 256)["train"].cpu / GIB == pytest.approx(8.7, rel=0.15)
    assert plan.peaks(phi2, full_size, 256)["merge"].cpu / GIB == pytest.approx(16.3, rel=0.15)
    dequantized = full_size.model_copy(update={"merge_base": "dequantized"})
    assert plan.peaks(phi2, dequantized, 256)["merge"].cpu / GIB == pytest.approx(18.6, rel=0.15)
    assert plan.peaks(phi2, full_size, 256)["export"].cpu / GIB == pytest.approx(20.5, rel=0.15)


def test_a_model_that_is_too_big_is_refused_in_one_line(tmp_path, phi2):
    phi2.save_pretrained(tmp_path)
    small = Machine(cores=2, memory=2 * GIB, disk=GIB, gpu=None)
    full_precision = REFERENCE.model_copy(update={"load_in_4bit": False, "fp16": False})
    with pytest.raises(StageError) as error:
        check_memory(tmp_path, REFERENCE, small)
    said = str(error.value)
    assert "GiB, and this machine has 2.0 GiB. Take the small recipe" in said and len(said.splitlines()) == 1
    with pytest.raises(StageError, match="Set load_in_4bit: true, or take the small recipe"):
        check_memory(tmp_path, full_precision, LAPTOP)
    check_memory(tmp_path, REFERENCE, LAPTOP)
    card = Machine(cores=2, memory=64 * GIB, disk=GIB, gpu=2 * GIB, gpu_name="Old Card")
    with pytest.raises(StageError, match="Old Card has 2.0 GiB"):
        check_memory(tmp_path, REFERENCE, card)
    # An adapter of rank 256 with its optimiser's state: 2.5 GiB beside 3.0 of weights.
    with pytest.raises(StageError, match="the model and its adapter take 5"):
        check_memory(tmp_path, REFERENCE.model_copy(update={"lora_r": 256}), dataclasses.replace(card, gpu=4 * GIB))


@pytest.fixture
def in_the_project(monkeypatch, tmp_path):
    """An empty folder with the recipes alone, as before any download."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")

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
    with pytest.raises(
        StageError, match="(?s)train: needs [45].*The nearest change that fits: gradient_checkpointing: true"
    ) as e:
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
    with pytest.raises(StageError, match=r"disk: needs 1\.\d GiB, 0.5 are free: free 1\.\d more"):
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


def test_merge_turns_to_the_cpu_only_where_the_card_is_too_small():
    planned = {"train": plan.Peak(9, 5), "merge": plan.Peak(16, 11), "export": plan.Peak(19, None)}
    card = Machine(cores=8, memory=64, disk=500, gpu=12, gpu_name="Card")
    assert [(n.needed, n.there) for n in plan.needs(planned, card)] == [(5, 12), (11, 12), (19, 64)]
    small = dataclasses.replace(card, gpu=6)
    assert [(n.needed, n.there) for n in plan.needs(planned, small)] == [(5, 6), (16, 64), (19, 64)]
    none = dataclasses.replace(card, gpu=None)
    assert [(n.needed, n.there) for n in plan.needs(planned, none)] == [(9, 64), (16, 64), (19, 64)]


def test_no_change_is_named_that_is_not_needed(phi2, monkeypatch):
    """Here only shorter conversations help: the milder changes before them are left as they are."""
    monkeypatch.setattr(
        plan, "peaks", lambda config, params, tokens: {"train": plan.Peak(0 if params.max_length <= 256 else 9, None)}
    )
    params = REFERENCE.model_copy(update={"fp16": False})
    machine = Machine(cores=2, memory=5, disk=5, gpu=None)
    assert plan.nearest(phi2, params, machine, 1024) == ["The nearest change that fits: max_length: 256"]
    monkeypatch.setattr(plan, "peaks", lambda *_: {"train": plan.Peak(9, None)})
    assert plan.nearest(phi2, params, machine, 1024)[0].startswith("No smaller setting of this model fits.")


def test_lengths_are_taken_of_both_splits_and_of_these_parameters_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "TOKENIZED", tmp_path)
    monkeypatch.setattr(plan, "RAW_SOURCE", tmp_path / "source.json")
    assert plan.tokenized(EMBEDDED) is None
    fetched = [{"source": EMBEDDED.dataset, "revision": None}]
    (tmp_path / "source.json").write_text(json.dumps(fetched))
    (tmp_path / "params.json").write_text(json.dumps({"max_length": 256, "chat_template": "chatml"}))
    pd.DataFrame({"length": [10, 80, 20, 30, 50, 40, 60, 70]}).to_parquet(tmp_path / "train.parquet")
    pd.DataFrame({"length": [90, 10]}).to_parquet(tmp_path / "validation.parquet")
    found = plan.tokenized(EMBEDDED)
    # Batches of four of like lengths: 40 and 80 tokens long.
    assert found == plan.Tokenized(conversations=8, longest=90, batch=60, held_out_tokens=100)
    in_any_order = EMBEDDED.model_copy(update={"train_sampling_strategy": "random"})
    assert plan.tokenized(in_any_order).batch == 75
    assert plan.tokenized(EMBEDDED.model_copy(update={"max_length": 128})) is None
    assert plan.tokenized(EMBEDDED.model_copy(update={"chat_template": "phi2"})) is None
    # Of another data set, though all else is the same.
    assert plan.tokenized(EMBEDDED.model_copy(update={"dataset": "file:data/local/mine.jsonl"})) is None
    (tmp_path / "source.json").write_text(json.dumps([*fetched, *fetched]))
    assert plan.tokenized(EMBEDDED) is None


def test_merging_and_scoring_by_hand(phi2):
    shape = Shape(parameters=1_000_000, quantised=640_000, largest_linear=64_000, adapter=10_000)
    # The model and its adapter in float32; beside it, where its weights come from there, the 4-bit one.
    assert memory.merge_bytes(shape, "original", True) == 4_040_000
    assert memory.merge_bytes(shape, "dequantized", True) == 4_040_000 + memory.weight_bytes(
        shape, "float32", True, True
    )
    # All tokens' logits, and at the loss as many log-probabilities beside them.
    logits = 2 * 128 * 51200 * 4
    assert 2 * logits <= memory.scoring_bytes(phi2, 2, 128) < 3.2 * logits
    card = plan.peaks(phi2, REFERENCE, 1024)
    others = 2_779_683_840 - 2_516_582_400
    weights = others * 4 + memory.quantised_bytes(2_516_582_400, True)
    assert card["load"].gpu == pytest.approx(0.6 * GIB + weights, abs=4)
    assert card["merge"].gpu == pytest.approx(0.6 * GIB + (2_779_683_840 + 10_485_760) * 4, abs=4)
    scoring = memory.scoring_bytes(phi2, REFERENCE.per_device_eval_batch_size, 1024)
    assert card["evaluate"].gpu == pytest.approx(0.6 * GIB + 2_779_683_840 * 2 + scoring, abs=4)
    assert card["export"].gpu is None


def test_a_model_of_a_folder_is_copied_and_not_downloaded(phi2):
    before, local, there = (
        plan.disk(phi2, REFERENCE, download, fetched) for download, fetched in ((None, False), (0, False), (0, True))
    )
    base = 2_779_683_840 * 2
    assert (before["download"], local["download"], there["download"]) == (base, 0, 0)
    assert before["outputs"] == local["outputs"] == there["outputs"] + base


@pytest.mark.slow
def test_steps_tokens_and_time_are_said_from_a_measured_batch(in_the_project, monkeypatch, capsys):
    in_the_project("smollm2-cpu", LAPTOP)
    config = json.loads((ROOT / "recipes/configs/smollm2-135m-instruct.json").read_text())["config"]
    monkeypatch.setattr(plan, "find_config", lambda *_: plan.Found(config, "models/base", 0, fetched=True))
    data = plan.Tokenized(conversations=100, longest=200, batch=150, held_out_tokens=6000)
    monkeypatch.setattr(plan, "tokenized", lambda _: data)
    monkeypatch.setattr(plan, "probe", lambda params, tokens: 6.0 if tokens == 150 else 1e9)
    plan.main()
    said = capsys.readouterr().out
    assert "10 steps, 160 conversations, at most 40,960 tokens" in said
    assert "1.6 passes over data/tokenized: 100 conversations, 200 tokens at most, 150 in a batch on average" in said
    # 40 batches of 6 s; three evaluations of ten batches each, of which each is a third of a step's work.
    assert "about 4 minutes of training steps, about 1 minutes of 3 evaluations, at the 6.0 s measured" in said


def test_what_does_not_fit_is_red_on_a_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert plan.red("TOO MUCH") == "\033[31mTOO MUCH\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert plan.red("TOO MUCH") == "TOO MUCH"
