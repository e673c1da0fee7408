"""What a step or an evaluation holds: the trace against real tensors, and against figures worked out by hand."""

import pandas as pd
import pytest
import torch
import trl.trainer.utils
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from commands import trace
from commands.trace import LiveBytes, checkpoint_activations, scoring_bytes, step_bytes, training_loss
from stages.common import memory
from stages.common.adapters import add_adapter, lora_config
from stages.common.model_files import linear_layers
from stages.common.trainer import build_trainer
from tests.support.params import TINY_TRAINING, train_params
from tests.support.plans import recorded_config


@pytest.fixture
def phi2():
    return recorded_config("phi-2")


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
    # So narrow that the output layer's buffer, of a fixed width, does not hide everything else.
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 64)
    monkeypatch.setattr("stages.common.trainer.fuse_lora", lambda *_: [])  # the trace is of PEFT's layers
    recipe = {"tiny_llama": "smollm2-cpu", "tiny_phi": "phi2-oasst1"}[model]
    settings = {"target_modules": ["q_proj", "v_proj"], "lora_r": 4, "lora_dropout": 0.1}
    changes = {"fp16": False, "bf16": mixed, "load_in_4bit": False, "gradient_checkpointing": checkpointed}
    params = train_params(recipe, **settings, **changes, per_device_train_batch_size=2)
    folder = request.getfixturevalue(model)
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = 7
    traced = step_bytes(config, params, 40)
    network = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if mixed:
        for layer in linear_layers(network).values():
            layer.to(torch.bfloat16)
    rows = pd.DataFrame({"input_ids": [[5] * 40] * 2, "assistant_masks": [[1] * 40] * 2, "length": [40, 40]})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token_id = 1
    trainer = build_trainer(add_adapter(network, params), params, tmp_path, (rows, rows), tokenizer)
    trainer.is_fast = False
    wrapped = trainer.accelerator.prepare(trainer.model)
    if checkpointed:
        checkpoint_activations(wrapped)
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
    batch, tokens = 2, 128
    settings = {"target_modules": ["q_proj"], "lora_r": 1, "lora_dropout": 0.0, "gradient_checkpointing": True}
    params = train_params("phi2-oasst1", **settings, fp16=False, per_device_train_batch_size=batch)

    def step(layers: int, on_gpu: bool = False) -> int:
        phi2.num_hidden_layers = layers
        return step_bytes(phi2, params, tokens, on_gpu)

    few, many, on_gpu = step(8), step(24), step(8, on_gpu=True)
    # With recomputed activations a layer keeps what goes into it: a float32 for each token and dimension.
    adapters = 16 * 2 * 2560 * 4  # and the gradients of its LoRA matrices of rank 1
    assert many - few == pytest.approx(16 * batch * tokens * 2560 * 4 + adapters, rel=0.1)
    # The logits are never all there. They are computed in tiles of some thousand tokens of the vocabulary. Several
    # tiles live at a time: products, exponentials, gradient, masks. A GPU's fused kernels work in one tile, in place.
    width = trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
    tile = batch * tokens * width * 4
    kept = 8 * batch * tokens * 2560 * 4  # into each of the eight layers
    one_layer = 25 * batch * tokens * 2560 * 4  # computed again: its MLP is four times as wide
    assert kept + 4 * tile < few < kept + one_layer + 10 * tile
    assert kept + tile < on_gpu < few - 3 * tile


@pytest.mark.slow
def test_less_is_planned_for_less(phi2):
    def step(**changes):
        settings = {"target_modules": ["q_proj"], "fp16": False, "gradient_checkpointing": False}
        return step_bytes(phi2, train_params("phi2-oasst1", **{**settings, **changes}), 256)

    checkpointed, mixed, plain = step(fp16=True, gradient_checkpointing=True), step(fp16=True), step()
    assert step(bf16=True) == mixed
    assert 3 * checkpointed < mixed < 0.7 * plain
    assert step(per_device_train_batch_size=2) < 0.6 * plain
    assert scoring_bytes(phi2, 4, 256) < 0.6 * scoring_bytes(phi2, 8, 256)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_batch_is_timed_with_the_parameters_of_the_run(checkpointed, tiny_llama, monkeypatch):
    seen = []

    def spy(model, ids):
        seen.append((ids.shape, model.training, model.is_gradient_checkpointing))
        return training_loss(model, ids)

    monkeypatch.setattr(trace, "training_loss", spy)
    seconds = trace.seconds_of_a_batch(
        tiny_llama, train_params(**TINY_TRAINING, gradient_checkpointing=checkpointed), 9
    )
    assert 0 < seconds < 60
    assert seen == [((2, 9), True, checkpointed)] * 2  # the second one counts


@pytest.mark.slow
def test_a_variant_of_lora_is_in_the_plan(phi2, monkeypatch):
    """DoRA, say: its weights are counted and its step is traced, though no code of the plan names it."""
    params = train_params("phi2-oasst1", gradient_checkpointing=False)
    plain = memory.shape_of(phi2, lora_config(params)).adapter, step_bytes(phi2, params, 256)

    def dora(params):
        config = lora_config(params)
        config.use_dora = True
        return config

    monkeypatch.setattr(trace, "lora_config", dora)
    shape, step = memory.shape_of(phi2, dora(params)).adapter, step_bytes(phi2, params, 256)
    assert shape == plain[0] + 32 * 4 * 2560  # a magnitude for each output of q_proj, k_proj, v_proj and dense
    assert step > plain[1]
