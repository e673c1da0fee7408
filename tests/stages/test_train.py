"""Training: every parameter reaches its library, gradients reach every adapter, evaluations change nothing."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer

from stages.common import models
from stages.common.errors import StageError
from stages.common.params import declared_keys, read_params
from stages.common.scoring import score
from stages.tokenize import load_template, set_special_tokens, tokenize
from stages.train import (
    CODE,
    add_adapter,
    build_trainer,
    check_logits,
    check_machine,
    compute_dtype,
    fingerprint,
    lora_config,
    loss_curves,
    to_dataset,
    training_arguments,
)
from tests.support.project import ROOT


def train_params(recipe: str, monkeypatch, **changes) -> SimpleNamespace:
    monkeypatch.chdir(ROOT)
    params = read_params(ROOT / f"recipes/{recipe}.yaml")
    return SimpleNamespace(**{**{key: getattr(params, key) for key in declared_keys("train")}, **changes})


TINY = {
    "max_steps": 4,
    "eval_steps": 1,
    "logging_steps": 1,
    "save_steps": 2,
    "learning_rate": 0.01,
    "max_grad_norm": 1.0,
}
TINY |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "warmup_ratio": 0.0}


def talk(i: int) -> list[dict]:
    return [{"role": "user", "content": f"What is {i} + 1?"}, {"role": "assistant", "content": f"It is {i + 1}."}]


def tokens(folder: Path, template: str, count: int = 12) -> tuple[pd.DataFrame, object]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_special_tokens(tokenizer, load_template(template, tokenizer), len(tokenizer) + 8)
    rows = pd.DataFrame({"messages": [talk(i) for i in range(count)], "trained": [[True]] * count, "lang": "en"})
    return tokenize(rows.assign(message_tree_id="t"), tokenizer, 128)[0], tokenizer


@pytest.mark.parametrize("recipe", ["phi2-oasst1", "smollm2-cpu"])
def test_every_parameter_reaches_its_library(recipe, monkeypatch, tmp_path):
    params = train_params(recipe, monkeypatch)
    values = vars(params).copy()

    args = training_arguments(params, tmp_path)
    assert args.warmup_steps == values.pop("warmup_ratio")
    assert args.lr_scheduler_type.value == values.pop("lr_scheduler_type")
    assert args.optim.value == values.pop("optim")
    for key in list(values):
        if hasattr(args, key):
            assert getattr(args, key) == values.pop(key), key
    assert args.get_warmup_steps(500) == 15

    lora = lora_config(params)
    assert lora.target_modules == set(values.pop("target_modules"))
    for key in ("lora_alpha", "lora_dropout"):
        assert getattr(lora, key) == values.pop(key)
    assert lora.r == values.pop("lora_r")
    assert lora.bias == "none" and lora.task_type == "CAUSAL_LM"

    dtype = compute_dtype(params.fp16, params.bf16)
    assert dtype == (torch.float16 if recipe == "phi2-oasst1" else torch.float32)
    config = models.quantization_config(params.bnb_4bit_quant_type, params.bnb_4bit_use_double_quant, dtype)
    for key in ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
        assert getattr(config, key) == values.pop(key)
    assert config.bnb_4bit_compute_dtype == dtype

    assert list(values) == ["attn_implementation"]  # goes to from_pretrained: see the next test


def load_tiny(folder: Path, params: SimpleNamespace):
    config = models.quantization_config("nf4", True, torch.float32)
    model = models.load_model(
        folder, torch.float32, quantization=config, attn_implementation=params.attn_implementation
    )
    return add_adapter(model, params)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementation_reaches_the_model(implementation, tiny_llama):
    model = models.load_model(tiny_llama, torch.float32, attn_implementation=implementation)
    assert model.config._attn_implementation == implementation


def train_tiny(folder, params, tmp_path, template, evaluate=True):
    rows, tokenizer = tokens(folder, template)
    args = training_arguments(params, tmp_path / f"out-{evaluate}")
    if not evaluate:
        args.eval_strategy, args.eval_on_start = "no", False
    trainer = build_trainer(
        load_tiny(folder, params), args, rows.head(9), rows.tail(3).reset_index(drop=True), tokenizer
    )
    trainer.train()
    return trainer


@pytest.fixture
def llama_params(monkeypatch):
    return train_params("smollm2-cpu", monkeypatch, **TINY)


@pytest.fixture
def phi_params(monkeypatch):
    changes = {**TINY, "fp16": False, "gradient_checkpointing": False}
    return train_params("phi2-oasst1", monkeypatch, **changes)


@pytest.mark.parametrize("load_in_4bit", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_adapter_is_float32_whatever_the_models_precision(dtype, load_in_4bit, tiny_phi, phi_params, tmp_path):
    """SFTTrainer casts a 4-bit model's adapter to bfloat16, over which the scaler of fp16 would stumble on a GPU."""
    phi_params.load_in_4bit, phi_params.bf16 = load_in_4bit, dtype == torch.bfloat16
    quantization = models.quantization_config("nf4", True, dtype) if load_in_4bit else None
    model = add_adapter(models.load_model(tiny_phi, dtype, quantization=quantization), phi_params)
    rows, tokenizer = tokens(tiny_phi, "phi2")
    trainer = build_trainer(model, training_arguments(phi_params, tmp_path), rows, rows, tokenizer)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert trained and {parameter.dtype for parameter in trained} == {torch.float32}
    if load_in_4bit:
        from bitsandbytes.nn import Linear4bit

        layers = [m for m in trainer.model.modules() if isinstance(m, Linear4bit)]
        assert layers and {layer.compute_dtype for layer in layers} == {dtype}


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_training_lowers_the_loss_and_gradients_reach_every_adapter_after_an_evaluation(name, request, tmp_path):
    folder, params = request.getfixturevalue(f"tiny_{name}"), request.getfixturevalue(f"{name}_params")
    rows, tokenizer = tokens(folder, {"llama": "chatml", "phi": "phi2"}[name])
    trainer = build_trainer(load_tiny(folder, params), training_arguments(params, tmp_path), rows, rows, tokenizer)
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


def test_gradient_checkpointing_gives_the_same_curve(tiny_llama, llama_params, tmp_path):
    llama_params.lora_dropout = 0.0
    plain = train_tiny(tiny_llama, llama_params, tmp_path, "chatml")
    llama_params.gradient_checkpointing = True
    checkpointed = train_tiny(tiny_llama, llama_params, tmp_path, "chatml")
    for split, curve in loss_curves(plain.state.log_history).items():
        pd.testing.assert_frame_equal(curve, loss_curves(checkpointed.state.log_history)[split], atol=1e-5)


def test_the_repacking_that_loses_gradients_is_off(tiny_llama, llama_params):
    flags = [
        module.support_avx512bf16_for_cpu
        for module in load_tiny(tiny_llama, llama_params).modules()
        if hasattr(module, "support_avx512bf16_for_cpu")
    ]
    assert len(flags) == 14 and not any(flags)


def test_a_tuned_tiny_model_learns_to_stop(tiny_llama, llama_params, tmp_path):
    from stages.evaluate import answer, question_of

    # Long enough to know it by heart: what it does is then no matter of the last digits.
    llama_params.max_steps, llama_params.eval_steps, llama_params.learning_rate = 200, 200, 0.003
    llama_params.per_device_train_batch_size, llama_params.gradient_accumulation_steps = 12, 1
    rows, tokenizer = tokens(tiny_llama, "chatml")
    trainer = build_trainer(
        load_tiny(tiny_llama, llama_params), training_arguments(llama_params, tmp_path), rows, rows, tokenizer
    )
    prompts = [question_of(row) for row in rows.itertuples()]
    before = answer(trainer.model.eval(), prompts, tokenizer, 24, 12)
    trainer.train()
    after = answer(trainer.model.eval(), prompts, tokenizer, 24, 12)
    assert sum(stopped for _, stopped in before) < len(prompts) / 2
    assert sum(stopped for _, stopped in after) == len(prompts)
    assert sum(text == f"It is {i + 1}." for i, (text, _) in enumerate(after)) > len(prompts) / 2


def test_collator_pads_and_masks(tiny_llama, llama_params, tmp_path):
    rows, tokenizer = tokens(tiny_llama, "chatml")
    rows.at[0, "input_ids"] = rows.at[0, "input_ids"][:-3] + [tokenizer.eos_token_id]
    rows.at[0, "assistant_masks"] = rows.at[0, "assistant_masks"][:-2]
    trainer = build_trainer(
        load_tiny(tiny_llama, llama_params), training_arguments(llama_params, tmp_path), rows, rows, tokenizer
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    # Padded to the longer of the two, not to max_length.
    assert batch["input_ids"].shape == batch["labels"].shape == (2, max(map(len, rows["input_ids"][:2])))
    for i in range(2):
        ids, mask = rows["input_ids"][i], rows["assistant_masks"][i]
        assert batch["input_ids"][i][: len(ids)].tolist() == ids
        assert (batch["input_ids"][i][len(ids) :] == tokenizer.pad_token_id).all()
        assert [x for x in batch["labels"][i].tolist() if x != -100] == [t for t, m in zip(ids, mask, strict=True) if m]
        assert batch["labels"][i].tolist()[len(ids) - 1] == tokenizer.eos_token_id  # the end token is learnt


def test_batches_are_of_like_lengths(tiny_llama, llama_params, tmp_path):
    rows, tokenizer = tokens(tiny_llama, "chatml", 80)
    lengths = [20 + i % 40 for i in range(80)]
    ids = [[5] * length for length in lengths]
    rows = rows.assign(input_ids=ids, assistant_masks=[[1] * n for n in lengths], length=lengths)

    def padding(strategy: str) -> int:
        params = SimpleNamespace(**{**vars(llama_params), "train_sampling_strategy": strategy})
        args = training_arguments(params, tmp_path / strategy)
        trainer = build_trainer(load_tiny(tiny_llama, params), args, rows, rows[:2], tokenizer)
        return sum(int((batch["labels"] == -100).sum()) for batch in trainer.get_train_dataloader())

    assert padding("group_by_length") < padding("random") / 3


def test_score_is_the_loss_of_each_conversation_alone(tiny_llama):
    rows, tokenizer = tokens(tiny_llama, "chatml")
    model = models.load_model(tiny_llama, torch.float32)
    scores = score(model, rows, 5, tokenizer.pad_token_id)
    for row, nll, count in zip(to_dataset(rows), scores["nll"], scores["tokens"], strict=True):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels).loss.item()
        assert count == (labels != -100).sum()
        assert nll / count == pytest.approx(loss, abs=1e-5)


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
    models.check_targets(models.load_config(tiny_llama), ["q_proj", "o_proj"])
    with pytest.raises(
        StageError, match="has no o_proj, gate_proj. Choose from q_proj, k_proj, v_proj, dense, fc1, fc2"
    ):
        models.check_targets(models.load_config(tiny_phi), ["q_proj", "o_proj", "gate_proj"])


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
    assert {path.name for path in CODE} == {"train.py", "checkpoints.py", "models.py", "scoring.py"}
    monkeypatch.setattr("stages.train.TOKENIZED", tmp_path / "tokenized")
    monkeypatch.setattr("stages.train.BASE", tmp_path / "base")
    monkeypatch.setattr("stages.train.LOCK", tmp_path / "packages/file")
    monkeypatch.setattr("stages.train.CODE", [tmp_path / "code/file"])
    names = ("tokenized", "base", "packages", "code")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    seen = [fingerprint(llama_params)]
    assert fingerprint(llama_params) == seen[0]
    for name in names:
        (tmp_path / name / "file").write_text("y")
        seen.append(fingerprint(llama_params))
    llama_params.learning_rate = 0.5
    seen.append(fingerprint(llama_params))
    assert len(set(seen)) == 6
