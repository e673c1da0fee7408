"""Training: every parameter reaches its library, gradients reach every adapter, evaluations change nothing."""

import numpy as np
import pandas as pd
import pytest
import torch
from bitsandbytes.nn import Linear4bit

from stages.common.adapters import add_adapter, lora_config
from stages.common.curves import loss_curves
from stages.common.errors import StageError
from stages.common.generation import greedy_answers
from stages.common.machine import check_machine
from stages.common.masks import question_of
from stages.common.model_files import check_targets, load_config
from stages.common.models import load_model, quantization_config, torch_dtype, training_dtype
from stages.common.pipeline import code_of
from stages.common.trainer import build_trainer, training_arguments
from stages.train import check_logits, fingerprint
from tests.support.params import TINY_TRAINING, train_params
from tests.support.training import load_tiny, tiny_trainer, tokens


@pytest.mark.parametrize("recipe", ["phi2-oasst1", "smollm2-cpu"])
def test_every_parameter_reaches_its_library(recipe, tmp_path):
    params = train_params(recipe)
    values = params.model_dump()

    args = training_arguments(params, tmp_path)
    assert args.warmup_steps == values.pop("warmup_ratio")
    assert args.lr_scheduler_type.value == values.pop("lr_scheduler_type")
    assert args.optim.value == values.pop("optim")
    assert values.pop("num_train_epochs") is None and values.pop("report_to") == "none" and args.report_to == []
    for key in list(values):
        if hasattr(args, key):
            assert getattr(args, key) == values.pop(key), key
    assert args.get_warmup_steps(500) == 15

    lora = lora_config(params)
    assert lora.target_modules == set(values.pop("target_modules"))
    for key in ("lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights"):
        assert getattr(lora, key) == values.pop(key)
    assert lora.r == values.pop("lora_r")
    assert lora.bias == "none" and lora.task_type == "CAUSAL_LM"

    dtype = torch_dtype(training_dtype(params.fp16, params.bf16))
    assert dtype == (torch.float16 if recipe == "phi2-oasst1" else torch.float32)
    config = quantization_config(params, dtype)
    for key in ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
        assert getattr(config, key) == values.pop(key)
    assert config.bnb_4bit_compute_dtype == dtype

    # from_pretrained, fuse_lora and early stopping take these: see the tests of each
    assert list(values) == ["attn_implementation", "dequantize_once", "early_stopping_patience"]


def test_other_values_reach_their_library_too():
    assert training_dtype(True, False) == "float16"
    assert training_dtype(False, True) == "bfloat16"
    assert training_dtype(False, False) == "float32"
    assert quantization_config(train_params(load_in_4bit=False), torch.float32) is None
    other = quantization_config(train_params(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False), torch.float32)
    assert (other.bnb_4bit_quant_type, other.bnb_4bit_use_double_quant) == ("fp4", False)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementation_reaches_the_model(implementation, tiny_llama):
    model = load_model(tiny_llama, torch.float32, attn_implementation=implementation)
    assert model.config._attn_implementation == implementation


def train_tiny(folder, params, tmp_path, template, evaluate=True):
    rows, tokenizer = tokens(folder, template)
    tables = (rows.head(9), rows.tail(3).reset_index(drop=True))
    trainer = build_trainer(load_tiny(folder, params), params, tmp_path / f"out-{evaluate}", tables, tokenizer)
    if not evaluate:
        trainer.args.eval_strategy, trainer.args.eval_on_start = "no", False
    trainer.train()
    return trainer


@pytest.fixture
def llama_params():
    return train_params("smollm2-cpu", **TINY_TRAINING)


@pytest.fixture
def phi_params():
    return train_params("phi2-oasst1", **TINY_TRAINING, fp16=False, gradient_checkpointing=False)


@pytest.mark.parametrize("load_in_4bit", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_adapter_is_float32_whatever_the_models_precision(dtype, load_in_4bit, tiny_phi, phi_params, tmp_path):
    """SFTTrainer casts a 4-bit model's adapter to bfloat16. The scaler of fp16 would then fail on a GPU."""
    params = phi_params.model_copy(update={"load_in_4bit": load_in_4bit, "bf16": dtype == torch.bfloat16})
    model = add_adapter(load_model(tiny_phi, dtype, quantization=quantization_config(params, dtype)), params)
    rows, tokenizer = tokens(tiny_phi, "phi2")
    trainer = build_trainer(model, params, tmp_path, (rows, rows), tokenizer)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert trained and {parameter.dtype for parameter in trained} == {torch.float32}
    layers = [m for m in trainer.model.modules() if isinstance(m, Linear4bit)]
    assert bool(layers) == load_in_4bit
    assert {layer.compute_dtype for layer in layers} == ({dtype} if load_in_4bit else set())


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_training_lowers_the_loss_and_gradients_reach_every_adapter_after_an_evaluation(name, request, tmp_path):
    folder, params = request.getfixturevalue(f"tiny_{name}"), request.getfixturevalue(f"{name}_params")
    rows, tokenizer = tokens(folder, {"llama": "chatml", "phi": "phi2"}[name])
    trainer = tiny_trainer(folder, params, rows, tokenizer, tmp_path)
    trainer.evaluate()
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
    trainer.compute_loss(trainer.model, batch).backward()
    adapters = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(".lora_" in n for n in adapters)
    assert all(p.dtype == torch.float32 for p in adapters.values())
    layers = {n.split(".layers.")[1][0] for n in adapters}
    assert layers == {"0", "1"}
    for n, p in adapters.items():
        if "lora_B" in n:  # A's gradient is zero while B is
            assert p.grad is not None and p.grad.abs().max() > 0, n
    trainer.model.zero_grad()
    trainer.train()
    curve = loss_curves(trainer.state.log_history)["validation"]
    assert curve["loss"].iloc[-1] < curve["loss"].iloc[0] - 0.1
    assert list(curve["step"]) == [0, 1, 2, 3, 4]


def test_evaluations_do_not_change_the_training(tiny_llama, llama_params, tmp_path):
    runs = [train_tiny(tiny_llama, llama_params, tmp_path, "chatml", evaluate) for evaluate in (True, False)]
    curves = [loss_curves(run.state.log_history)["train"] for run in runs]
    pd.testing.assert_frame_equal(*curves)
    weights = [dict(run.model.named_parameters()) for run in runs]
    for name, parameter in weights[0].items():
        if parameter.requires_grad:
            assert torch.equal(parameter, weights[1][name]), name


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_curve(tiny_llama, llama_params, tmp_path):
    plain_params = llama_params.model_copy(update={"lora_dropout": 0.0})
    plain = train_tiny(tiny_llama, plain_params, tmp_path, "chatml")
    recomputing = plain_params.model_copy(update={"gradient_checkpointing": True})
    checkpointed = train_tiny(tiny_llama, recomputing, tmp_path, "chatml")
    for split, curve in loss_curves(plain.state.log_history).items():
        pd.testing.assert_frame_equal(curve, loss_curves(checkpointed.state.log_history)[split], atol=1e-5)


def test_the_repacking_that_loses_gradients_is_off(tiny_llama, llama_params):
    flags = [
        module.support_avx512bf16_for_cpu
        for module in load_tiny(tiny_llama, llama_params).modules()
        if hasattr(module, "support_avx512bf16_for_cpu")
    ]
    assert len(flags) == 14 and not any(flags)


@pytest.mark.slow
def test_a_tuned_tiny_model_learns_to_stop(tiny_llama, llama_params, tmp_path):
    # It learns the answers by heart, so that the last digits of its weights do not matter.
    changes = {"max_steps": 200, "eval_steps": 200, "learning_rate": 0.003}
    changes |= {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}
    params = llama_params.model_copy(update=changes)
    rows, tokenizer = tokens(tiny_llama, "chatml")
    trainer = tiny_trainer(tiny_llama, params, rows, tokenizer, tmp_path)
    prompts = [question_of(row) for row in rows.itertuples()]

    def ended(answers: list[list[int]]) -> int:
        return sum(answer[-1] == tokenizer.eos_token_id for answer in answers)

    before = greedy_answers(trainer.model.eval(), tokenizer, prompts, 24, 12)
    trainer.train()
    after = greedy_answers(trainer.model.eval(), tokenizer, prompts, 24, 12)
    assert ended(before) < len(prompts) / 2
    assert ended(after) == len(prompts)
    texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in after]
    assert sum(text == f"It is {i + 1}." for i, text in enumerate(texts)) > len(prompts) / 2


def test_collator_pads_and_masks(tiny_llama, llama_params, tmp_path):
    rows, tokenizer = tokens(tiny_llama, "chatml")
    rows.at[0, "input_ids"] = np.append(rows.at[0, "input_ids"][:-3], tokenizer.eos_token_id)
    rows.at[0, "assistant_masks"] = rows.at[0, "assistant_masks"][:-2]
    trainer = tiny_trainer(tiny_llama, llama_params, rows, tokenizer, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    # Padded to the longer of the two, not to max_length.
    assert batch["input_ids"].shape == batch["labels"].shape == (2, max(map(len, rows["input_ids"][:2])))
    for i in range(2):
        ids, mask = rows["input_ids"][i], rows["assistant_masks"][i]
        assert batch["input_ids"][i][: len(ids)].tolist() == list(ids)
        assert (batch["input_ids"][i][len(ids) :] == tokenizer.pad_token_id).all()
        assert [x for x in batch["labels"][i].tolist() if x != -100] == [t for t, m in zip(ids, mask, strict=True) if m]
        assert batch["labels"][i].tolist()[len(ids) - 1] == tokenizer.eos_token_id  # the end token is learnt


def test_batches_are_of_like_lengths(tiny_llama, llama_params, tmp_path):
    rows, tokenizer = tokens(tiny_llama, "chatml", 80)
    lengths = [20 + i % 40 for i in range(80)]
    ids = [[5] * length for length in lengths]
    rows = rows.assign(input_ids=ids, assistant_masks=[[1] * n for n in lengths], length=lengths)

    def padding(strategy: str) -> int:
        params = llama_params.model_copy(update={"train_sampling_strategy": strategy})
        trainer = tiny_trainer(tiny_llama, params, rows, tokenizer, tmp_path / strategy, held_out=rows[:2])
        return sum(int((batch["labels"] == -100).sum()) for batch in trainer.get_train_dataloader())

    assert padding("group_by_length") < padding("random") / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_finite_check_computes_in_the_training_precision(dtype, tiny_llama, llama_params):
    model, seen = load_tiny(tiny_llama, llama_params), []
    layer = model.get_base_model().model.layers[0].self_attn
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output[0].dtype))
    check_logits(model, [5, 6, 7], dtype)
    assert seen == [dtype]
    with torch.no_grad():
        model.get_base_model().model.norm.weight.fill_(float("inf"))
    with pytest.raises(StageError, match="logits are not finite"):
        check_logits(model, [5, 6, 7], dtype)


def test_targets_that_do_not_fit_name_those_that_do(tiny_phi, tiny_llama):
    check_targets(load_config(tiny_llama), ["q_proj", "o_proj"])
    with pytest.raises(
        StageError, match="has no o_proj, gate_proj. Choose from q_proj, k_proj, v_proj, dense, fc1, fc2"
    ):
        check_targets(load_config(tiny_phi), ["q_proj", "o_proj", "gate_proj"])


def test_a_machine_that_cannot_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_machine(False, True, "sdpa")
    with pytest.raises(StageError, match="fp16: true: needs a CUDA GPU"):
        check_machine(True, False, "sdpa")
    with pytest.raises(StageError, match="flash_attention_2 needs a CUDA GPU"):
        check_machine(False, False, "flash_attention_2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    check_machine(True, False, "sdpa")
    with pytest.raises(StageError, match="Tesla T4 has no bfloat16"):
        check_machine(False, True, "sdpa")
    with pytest.raises(StageError, match="flash_attention_2 computes in 16 bits only"):
        check_machine(False, False, "flash_attention_2")
    with pytest.raises(StageError, match="flash_attention_2 needs the package flash-attn"):
        check_machine(True, False, "flash_attention_2")


def test_fingerprint_follows_params_data_model_code_and_packages(llama_params, tmp_path, monkeypatch):
    names = {path.name for path in code_of("train")}
    assert {"train.py", "adapters.py", "checkpoints.py", "models.py", "scoring.py", "trainer.py"} <= names
    monkeypatch.setattr("stages.train.TOKENIZED", tmp_path / "tokenized")
    monkeypatch.setattr("stages.train.BASE", tmp_path / "base")
    monkeypatch.setattr("stages.train.LOCK", tmp_path / "packages/file")
    monkeypatch.setattr("stages.train.code_of", lambda stage: [tmp_path / "code/file"] if stage == "train" else [])
    names = ("tokenized", "base", "packages", "code")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    seen = [fingerprint(llama_params)]
    assert fingerprint(llama_params) == seen[0]
    for name in names:
        (tmp_path / name / "file").write_text("y")
        seen.append(fingerprint(llama_params))
    seen.append(fingerprint(llama_params.model_copy(update={"learning_rate": 0.5})))
    assert len(set(seen)) == 6
