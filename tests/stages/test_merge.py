"""Merging: the merged model is the unmerged one, in both ways; the card says what the artifacts say."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_train import train_params

from stages.common import models
from stages.common.artifacts import read_json
from stages.common.errors import StageError
from stages.merge import mean_difference, merge_adapter, model_card, probe_logits
from stages.tokenize import load_template, set_special_tokens
from stages.train import add_adapter
from tests.support.project import TINY


@pytest.fixture(params=["llama", "phi", "gpt2"])
def adapter(request, monkeypatch, tmp_path):
    """A base model, an adapter with weights of a real run's size on its 4-bit form, and its tokenizer."""
    from transformers import AutoTokenizer

    base = request.getfixturevalue(f"tiny_{request.param}")
    recipe, template = ("smollm2-cpu", "chatml") if request.param == "llama" else ("phi2-oasst1", "phi2")
    config = models.quantization_config("nf4", True, torch.float32)
    params = train_params(recipe, monkeypatch)
    if request.param == "gpt2":
        params.target_modules = ["c_attn", "c_fc", "c_proj"]
        models.check_targets(models.load_config(base), params.target_modules)
    model = add_adapter(models.load_model(base, torch.float32, quantization=config), params)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    set_special_tokens(tokenizer, load_template(template, tokenizer), len(tokenizer) + 8)
    return SimpleNamespace(base=base, folder=tmp_path / "adapter", tokenizer=tokenizer, config=config)


@pytest.mark.parametrize("merge_base", ["dequantized", "original"])
def test_merged_is_base_plus_adapter(adapter, merge_base):
    merged, expected = merge_adapter(
        adapter.base, adapter.folder, merge_base, adapter.config, "sdpa", adapter.tokenizer
    )
    assert mean_difference(probe_logits(merged, adapter.tokenizer), expected) < 1e-5
    untouched = probe_logits(models.load_model(adapter.base, torch.float32), adapter.tokenizer)
    assert mean_difference(untouched, expected) > 1e-3  # the adapter does something
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_the_two_bases_differ(adapter):
    way = {
        which: merge_adapter(adapter.base, adapter.folder, which, adapter.config, "sdpa", adapter.tokenizer)[1]
        for which in ("dequantized", "original")
    }
    assert mean_difference(way["dequantized"], way["original"]) > 1e-4


def test_an_adapter_of_another_model_is_refused(adapter, tiny_llama, tiny_phi):
    other = tiny_phi if adapter.base == tiny_llama else tiny_llama
    with pytest.raises(StageError, match="does not fit models/base"):
        merge_adapter(other, adapter.folder, "original", None, "sdpa", adapter.tokenizer)


def test_model_card_says_what_the_artifacts_say():
    training = {
        "params": {"learning_rate": 2e-4, "lora_r": 16},
        "train_conversations": 161,
        "train_supervised_tokens": 21679,
        "held_out_conversations": 30,
        "held_out_loss_before": 3.3,
        "held_out_loss_after": 3.1,
    }
    base = {"source": "microsoft/phi-2", "revision": "ef38", "license": "mit"}
    data = [
        {"source": "OpenAssistant/oasst1", "revision": "fdf7", "license": "apache-2.0"},
        {"source": "file:data/local/mine.jsonl", "revision": None, "license": None},
    ]
    card = model_card(training, base, data, SimpleNamespace(merge_base="original", merge_dtype="float16"))
    front = card.split("---")[1]
    assert "license: mit" in front and "base_model: microsoft/phi-2" in front
    assert "datasets:\n- OpenAssistant/oasst1\nlibrary_name" in front
    for fact in ("`OpenAssistant/oasst1` at `fdf7`, licence apache-2.0", "161 conversations", "3.3000 before, 3.1000"):
        assert fact in card
    assert "`file:data/local/mine.jsonl` at the version in this repository, licence not stated" in card
    assert "| learning_rate | `0.0002` |" in card
    card = model_card(
        training,
        {**base, "source": "pypi:x==1/y", "license": None},
        data,
        SimpleNamespace(merge_base="original", merge_dtype="float16"),
    )
    assert "license: other" in card and "base_model:" not in card


@pytest.mark.slow
def test_a_bound_that_is_passed_fails_the_stage_and_leaves_nothing(tiny_project):
    for stage in ("fetch", "prepare", "tokenize", "train"):
        tiny_project.run(f"stages.{stage}")
    tiny_project.set(merge_dtype="bfloat16", merge_max_logit_diff=1e-9)
    result = tiny_project.run("stages.merge", check=False)
    assert result.returncode == 1
    assert "more than merge_max_logit_diff" in result.stderr and "Traceback" not in result.stderr
    assert not (tiny_project.folder / "models/merged").exists()
    tiny_project.set(merge_dtype="bfloat16", merge_max_logit_diff=1.0)
    tiny_project.run("stages.merge")
    merged = tiny_project.folder / "models/merged"
    weights = load_file(merged / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    generation = read_json(merged / "generation_config.json")
    assert generation["eos_token_id"] == 2 and generation["pad_token_id"] == 0
    card = Path(merged / "README.md").read_text(encoding="utf-8")
    assert f"| max_steps | `{TINY['max_steps']}` |" in card
