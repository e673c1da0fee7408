"""What each stage needs: exact counts of weights, memory by hand, measured runs, merge's choice of device."""

import dataclasses
import json

import pytest

from commands import needs
from commands.needs import Peak, disk, peaks
from commands.trace import answering_bytes, scoring_bytes
from stages.common import memory
from stages.common.adapters import lora_config
from stages.common.errors import StageError
from stages.common.machine import Machine
from stages.common.memory import GIB, Shape
from stages.train import check_memory
from tests.support.plans import CONFIGS, EMBEDDED, LAPTOP, REFERENCE, recorded_config


@pytest.fixture
def phi2():
    return recorded_config("phi-2")


def test_every_recipe_has_its_models_configuration_beside_it():
    known = {(c["base_model"], c["base_model_revision"]) for c in (json.loads(p.read_text()) for p in CONFIGS)}
    assert {(p.base_model, p.base_model_revision) for p in (REFERENCE, EMBEDDED)} == known


def test_phi2_is_counted_to_the_last_weight(phi2):
    shape = memory.shape_of(phi2, lora_config(REFERENCE))
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
    monkeypatch.setattr(needs, "step_bytes", lambda *_, **__: 3 * GIB)
    monkeypatch.setattr(needs, "scoring_bytes", lambda *_: 2 * GIB)
    others = 2_779_683_840 - 2_516_582_400
    weights = others * 4 + 2_516_582_400 / 2 + 2_516_582_400 / 64 * (1 + 4 / 256)
    expected = 0.6 * GIB + weights + 10_485_760 * 16 + 3 * GIB + 2560 * 10240 * 2
    assert peaks(phi2, REFERENCE, 1024)["train"].gpu == pytest.approx(expected, abs=4)


@pytest.mark.slow
def test_merging_and_scoring_by_hand(phi2):
    shape = Shape(parameters=1_000_000, quantised=640_000, largest_linear=64_000, adapter=10_000)
    # The model and its adapter in float32; beside it, where its weights come from there, the 4-bit one.
    assert memory.merge_bytes(shape, "original", True) == 4_040_000
    assert memory.merge_bytes(shape, "dequantized", True) == 4_040_000 + memory.weight_bytes(
        shape, "float32", True, True
    )
    # All tokens' logits, and at the loss as many log-probabilities beside them.
    logits = 2 * 128 * 51200 * 4
    assert 2 * logits <= scoring_bytes(phi2, 2, 128) < 3.2 * logits
    card = peaks(phi2, REFERENCE, 1024)
    others = 2_779_683_840 - 2_516_582_400
    weights = others * 4 + memory.quantised_bytes(2_516_582_400, True)
    assert card["load"].gpu == pytest.approx(0.6 * GIB + weights, abs=4)
    assert card["merge"].gpu == pytest.approx(0.6 * GIB + (2_779_683_840 + 10_485_760) * 4, abs=4)
    scoring = scoring_bytes(phi2, REFERENCE.per_device_eval_batch_size, 1024)
    answering = answering_bytes(phi2, REFERENCE.answer_batch_size, 1024 + 256, "bfloat16")
    assert answering > 33 * 2 * 8 * 1280 * 2560 * 2  # keys and values of all layers, and of one layer twice
    assert card["evaluate"].gpu == pytest.approx(0.6 * GIB + 2_779_683_840 * 2 + max(scoring, answering), abs=4)
    assert card["export"].gpu is None


@pytest.mark.slow
def test_the_plans_of_the_measured_runs_are_within_15_percent(phi2):
    """Peaks in GiB that `python -m bench.plan` and `python -m bench.phi2_full_size` measured; see docs/measurements.md
    and docs/reference-recipe.md."""
    smollm2 = recorded_config("smollm2-135m-instruct")
    measured = EMBEDDED.model_copy(update={"lora_dropout": 0.05, "dequantize_once": False})  # the recipe of that run
    assert peaks(smollm2, measured, 255)["train"].cpu / GIB == pytest.approx(5.67, rel=0.15)
    full_size = REFERENCE.model_copy(
        update={"fp16": False, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "max_length": 256}
    )
    assert peaks(phi2, full_size, 256)["train"].cpu / GIB == pytest.approx(8.7, rel=0.15)
    assert peaks(phi2, full_size, 256)["merge"].cpu / GIB == pytest.approx(16.3, rel=0.15)
    dequantized = full_size.model_copy(update={"merge_base": "dequantized"})
    assert peaks(phi2, dequantized, 256)["merge"].cpu / GIB == pytest.approx(18.6, rel=0.15)
    assert peaks(phi2, full_size, 256)["export"].cpu / GIB == pytest.approx(20.5, rel=0.15)


@pytest.mark.slow
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


def test_merge_turns_to_the_cpu_only_where_the_card_is_too_small():
    planned = {"train": Peak(9, 5), "merge": Peak(16, 11), "export": Peak(19, None)}
    card = Machine(cores=8, memory=64, disk=500, gpu=12, gpu_name="Card")
    assert [(n.needed, n.there) for n in needs.needs(planned, card)] == [(5, 12), (11, 12), (19, 64)]
    small = dataclasses.replace(card, gpu=6)
    assert [(n.needed, n.there) for n in needs.needs(planned, small)] == [(5, 6), (16, 64), (19, 64)]
    none = dataclasses.replace(card, gpu=None)
    assert [(n.needed, n.there) for n in needs.needs(planned, none)] == [(9, 64), (16, 64), (19, 64)]


def test_a_model_of_a_folder_is_copied_and_not_downloaded(phi2):
    before, local, there = (
        disk(phi2, REFERENCE, download, fetched) for download, fetched in ((None, False), (0, False), (0, True))
    )
    base = 2_779_683_840 * 2
    assert (before["download"], local["download"], there["download"]) == (base, 0, 0)
    assert before["outputs"] == local["outputs"] == there["outputs"] + base


def test_kept_weights_are_in_the_plan():
    smollm2 = recorded_config("smollm2-135m-instruct")
    kept, not_kept = (
        peaks(smollm2, EMBEDDED.model_copy(update={"dequantize_once": once}), 255)["train"] for once in (True, False)
    )
    linear = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)  # of 30 layers, 4 bytes each
    assert kept.cpu - not_kept.cpu == 4 * linear and kept.gpu == not_kept.gpu
