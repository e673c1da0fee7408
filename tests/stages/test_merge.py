"""Merging: the merged model is the unmerged one, in both ways; the card says what the artifacts say."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from stages.common.artifacts import read_json
from stages.common.cards import model_card
from stages.common.errors import StageError
from stages.common.model_files import check_targets, load_config
from stages.common.models import load_model
from stages.merge import check_difference, mean_difference, merge_adapter, merge_attention, probe_logits, trained_with
from tests.support.params import train_params
from tests.support.project import TINY
from tests.support.training import load_tiny, tokenizer_of


@pytest.fixture(scope="module", params=["llama", "phi", "gpt2"])
def adapter(request, tmp_path_factory):
    """A base model, an adapter with weights of a real run's size on its 4-bit form, and its tokenizer."""
    base = request.getfixturevalue(f"tiny_{request.param}")
    recipe, template = ("smollm2-cpu", "chatml") if request.param == "llama" else ("phi2-oasst1", "phi2")
    params = train_params(recipe)
    if request.param == "gpt2":
        params = params.model_copy(update={"target_modules": ["c_attn", "c_fc", "c_proj"]})
        check_targets(load_config(base), params.target_modules)
    model = load_tiny(base, params)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return SimpleNamespace(base=base, folder=folder, tokenizer=tokenizer_of(base, template), params=params)


def merge(adapter, merge_base, base=None):
    return merge_adapter(base or adapter.base, adapter.folder, merge_base, adapter.params, adapter.tokenizer)


@pytest.mark.parametrize("merge_base", ["dequantized", "original"])
def test_merged_is_base_plus_adapter(adapter, merge_base):
    merged, expected = merge(adapter, merge_base)
    assert mean_difference(probe_logits(merged, adapter.tokenizer), expected) < 1e-5
    untouched = probe_logits(load_model(adapter.base, torch.float32), adapter.tokenizer)
    assert mean_difference(untouched, expected) > 1e-3  # the adapter does something
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_the_two_bases_differ(adapter):
    way = {which: merge(adapter, which)[1] for which in ("dequantized", "original")}
    assert mean_difference(way["dequantized"], way["original"]) > 1e-4


def test_an_adapter_of_another_model_is_refused(adapter, tiny_llama, tiny_phi):
    other = tiny_phi if adapter.base == tiny_llama else tiny_llama
    with pytest.raises(StageError, match=f"does not fit {other}"):
        merge(adapter, "original", other)


@pytest.mark.parametrize("values", [{}, [], "x", {"lora_r": "16"}])
def test_a_record_of_no_training_is_one_line(values):
    with pytest.raises(
        StageError, match="training.json holds no parameters of a training .* `dvc repro train`"
    ) as error:
        trained_with(values, Path("models/adapter/training.json"))
    assert len(str(error.value).splitlines()) == 1


def test_merging_computes_in_float32_whatever_kernel_trained():
    assert merge_attention(train_params(attn_implementation="flash_attention_2")) == "sdpa"
    assert merge_attention(train_params(attn_implementation="sdpa")) == "sdpa"
    assert merge_attention(train_params(attn_implementation="eager")) == "eager"


def test_the_bound():
    check_difference(0.05, 0.05)
    for difference in (0.0501, float("nan")):
        with pytest.raises(StageError, match="more than merge_max_logit_diff, 0.05"):
            check_difference(difference, 0.05)


def test_model_card_says_what_the_artifacts_say():
    training = {
        "params": {"learning_rate": 2e-4, "lora_r": 16},
        "train_conversations": 161,
        "train_supervised_tokens": 21679,
        "held_out_conversations": 30,
        "held_out_loss_before": 3.3,
        "held_out_loss_after": 3.1,
    }
    base = {"source": "microsoft/phi-2", "revision": "ef38", "hub": "microsoft/phi-2", "license": "mit"}
    data = [
        {
            "source": "OpenAssistant/oasst1/one/file.jsonl.gz",
            "revision": "fdf7",
            "hub": "OpenAssistant/oasst1",
            "license": "apache-2.0",
        },
        {"source": "file:data/local/mine.jsonl", "revision": None, "hub": None, "license": None},
    ]
    merging = {"merge_base": "original", "merge_dtype": "float16"}
    card = model_card(training, base, data, merging)
    front = card.split("---")[1]
    assert "license: mit" in front and "base_model: microsoft/phi-2" in front
    assert "datasets:\n- OpenAssistant/oasst1\nlibrary_name" in front
    for fact in (
        "`OpenAssistant/oasst1/one/file.jsonl.gz` at `fdf7`, licence apache-2.0",
        "161 conversations",
        "3.3000 before, 3.1000",
        "LoRA into the original base, weights in float16",
    ):
        assert fact in card
    assert "`file:data/local/mine.jsonl` at the version in this repository, licence not stated" in card
    assert "| learning_rate | `0.0002` |" in card
    local = {**base, "source": "pypi:x==1/y", "hub": None, "license": None}
    card = model_card(training, local, [data[1]], merging)
    assert "license: other" in card and "base_model:" not in card and "datasets:" not in card


@pytest.mark.slow
def test_a_bound_that_is_passed_fails_the_stage_and_leaves_nothing(finished_project):
    finished_project.remove("models/merged")
    finished_project.set(merge_dtype="bfloat16", merge_max_logit_diff=1e-9)
    result = finished_project.run("stages", "merge", check=False)
    assert result.returncode == 1
    assert "more than merge_max_logit_diff" in result.stderr and "Traceback" not in result.stderr
    assert not (finished_project.folder / "models/merged").exists()
    finished_project.set(merge_dtype="bfloat16", merge_max_logit_diff=1.0)
    finished_project.run("stages", "merge")
    merged = finished_project.folder / "models/merged"
    weights = load_file(merged / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    generation = read_json(merged / "generation_config.json")
    assert generation["eos_token_id"] == 2 and generation["pad_token_id"] == 0
    card = Path(merged / "README.md").read_text(encoding="utf-8")
    assert f"| max_steps | `{TINY['max_steps']}` |" in card
