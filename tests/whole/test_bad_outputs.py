"""What a stage finds of the stages before it, missing, edited or damaged: each case is one line; nothing is lost."""

import importlib
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from stages.common.machine import Machine
from tests.support.project import set_params
from tests.support.refused import edit_json, refused, truncate


@pytest.fixture
def made(finished, tmp_path, monkeypatch):
    """A copy of the finished project, in which the test runs."""
    folder = tmp_path / "project"
    shutil.copytree(finished.folder, folder, ignore=shutil.ignore_patterns(".git", ".dvc", ".home"))
    monkeypatch.chdir(folder)
    return folder


def other_vocabulary(base) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<new{i}>" for i in range(5000)])
    tokenizer.save_pretrained(base)


def without_a_weight(file) -> None:
    weights = load_file(file)
    weights.pop(sorted(weights)[-1])
    save_file(weights, file, metadata={"format": "pt"})


def with_infinite_norm(file) -> None:
    weights = load_file(file)
    weights["model.norm.weight"].fill_(float("inf"))
    save_file(weights, file, metadata={"format": "pt"})


def unpickled(adapter) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def of_another_base(adapter) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({n: w.repeat(1, 2) if "lora_A" in n else w for n, w in load_file(file).items()}, file)


def unlink(name):
    return lambda p: (p / name).unlink()


def rewrite(name, content):
    return lambda p: (p / name).write_text(content)


def drop_column(name, column):
    return lambda p: pd.read_parquet(p / name).drop(columns=column).to_parquet(p / name)


def no_rows(name):
    return lambda p: pd.read_parquet(p / name).head(0).to_parquet(p / name)


PREPARED, TOKENIZED = "data/prepared/train.parquet", "data/tokenized/validation.parquet"
STATES = {
    "sources, no list": ("prepare", rewrite("data/raw/source.json", "{}"), "is not as fetch writes it"),
    "sources, of nothing": ("prepare", rewrite("data/raw/source.json", "[{}]"), "is not as fetch writes it"),
    "prepared, its params a list": ("tokenize", rewrite("data/prepared/params.json", "[]"), "holds no JSON object"),
    "tokens, their params a list": ("train", rewrite("data/tokenized/params.json", "[]"), "holds no JSON object"),
    "base, numbers that are none": (
        "train",
        lambda p: with_infinite_norm(p / "models/base/model.safetensors"),
        "logits are not finite in this number format, before any training",
    ),
    "prepared, gone": ("tokenize", unlink(PREPARED), "train.parquet is missing"),
    "prepared, edited": ("tokenize", rewrite(PREPARED, "x"), "train.parquet cannot be read"),
    "prepared, without a column": ("tokenize", drop_column(PREPARED, "trained"), "has no trained"),
    "prepared, without rows": ("tokenize", no_rows(PREPARED), "has no rows"),
    "prepared, its params gone": ("tokenize", unlink("data/prepared/params.json"), "params.json is missing"),
    "base, its tokenizer edited": ("tokenize", rewrite("models/base/tokenizer.json", "{}"), "holds no tokenizer"),
    "base, its config gone": ("tokenize", unlink("models/base/config.json"), "no model of a known type"),
    "another vocabulary": ("tokenize", lambda p: other_vocabulary(p / "models/base"), "they do not fit"),
    "too short a model": ("tokenize", lambda p: set_params(p, max_length=4096), "reads at most 512 tokens"),
    "no such template": ("tokenize", lambda p: set_params(p, chat_template="none"), "none.jinja does not exist"),
    "a template that writes no content": (
        "tokenize",
        lambda p: (rewrite("stages/templates/bare.jinja", "{{ messages }}")(p), set_params(p, chat_template="bare")),
        "it does not write the content of user messages",
    ),
    "tokens, gone": ("train", unlink("data/tokenized/train.parquet"), "train.parquet is missing"),
    "tokens, without a column": ("train", drop_column(TOKENIZED, "length"), "has no length"),
    "their tokenizer gone": (
        "train",
        lambda p: shutil.rmtree(p / "data/tokenized/tokenizer"),
        "holds no tokenizer",
    ),
    "their params edited": ("train", rewrite("data/tokenized/params.json", "[1"), "is not valid JSON"),
    "a layer that is none": ("train", lambda p: set_params(p, target_modules=["fc9"]), "the base model has no fc9"),
    "base, truncated": ("train", lambda p: truncate(p / "models/base/model.safetensors"), "is damaged"),
    "base, weights gone": ("train", unlink("models/base/model.safetensors"), "cannot be loaded"),
    "base, a weight lacking": (
        "train",
        lambda p: without_a_weight(p / "models/base/model.safetensors"),
        "weights are missing",
    ),
    "base, of other sizes": (
        "train",
        lambda p: edit_json(p / "models/base/config.json", intermediate_size=96),
        "by config.json [64, 96]: they belong to two models",
    ),
    "adapter, its record gone": ("merge", unlink("models/adapter/training.json"), "training.json is missing"),
    "adapter, its record edited": ("merge", rewrite("models/adapter/training.json", "{}"), "has no params"),
    "adapter, gone": ("merge", unlink("models/adapter/adapter_model.safetensors"), "pickled weights (.bin) are never"),
    "adapter, pickled": ("merge", lambda p: unpickled(p / "models/adapter"), "pickled weights (.bin) are never"),
    "adapter, truncated": (
        "merge",
        lambda p: truncate(p / "models/adapter/adapter_model.safetensors"),
        "does not fit models/base",
    ),
    "adapter, a weight lacking": (
        "merge",
        lambda p: without_a_weight(p / "models/adapter/adapter_model.safetensors"),
        "does not fit models/base (only one",
    ),
    "adapter, of another base": ("merge", lambda p: of_another_base(p / "models/adapter"), "does not fit models/base"),
    "adapter, its config edited": (
        "merge",
        rewrite("models/adapter/adapter_config.json", "{}"),
        "does not fit models/base",
    ),
    "its source edited": ("merge", rewrite("data/raw/source.json", "none"), "source.json is not valid JSON"),
    "merged, truncated": ("evaluate", lambda p: truncate(p / "models/merged/model.safetensors"), "is damaged"),
    "merged, gone": ("evaluate", lambda p: shutil.rmtree(p / "models/merged"), "models/merged holds no model"),
    "held-out part, without a column": ("evaluate", drop_column(TOKENIZED, "lang"), "has no lang"),
    "export: merged, gone": ("export", lambda p: shutil.rmtree(p / "models/merged"), "holds no tokenizer"),
    "export: merged, truncated": ("export", lambda p: truncate(p / "models/merged/model.safetensors"), "is damaged"),
    "export: held-out part, without a column": ("export", drop_column(TOKENIZED, "length"), "has no length"),
    "figures, edited": ("summary", rewrite("reports/evaluation.json", "{}"), "has no held_out"),
    "figures, gone": ("summary", unlink("reports/evaluation.json"), "evaluation.json is missing"),
    "figures of the export, gone": ("summary", unlink("reports/exported.json"), "exported.json is missing"),
    "samples, gone": ("summary", unlink("reports/samples.json"), "samples.json is missing"),
    "no run yet": ("summary", unlink("dvc.lock"), "nothing was made yet"),
    "dvc.lock, cut off": ("summary", rewrite("dvc.lock", "schema: '2.0'\nstages: {a: ["), "dvc.lock is damaged"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", STATES)
def test_what_a_stage_finds_of_the_stages_before_it(case, made, capsys):
    stage, damage, said = STATES[case]
    damage(made)
    line = refused(stage, capsys)
    assert said in line, line


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, said", [("train", "adapter take"), ("merge", "merging takes"), ("export", "exporting takes at least")]
)
def test_a_stage_that_the_machine_cannot_do_says_so_first(stage, said, made, monkeypatch, capsys):
    small = Machine(cores=2, memory=64 << 20, disk=1 << 40, gpu=None)
    monkeypatch.setattr(importlib.import_module(f"stages.{stage}"), "this_machine", lambda: small)
    line = refused(stage, capsys)
    assert said in line and "and this machine has 0.1 GiB" in line


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which trains in float16")
def test_the_reference_recipes_precision_is_refused_without_a_gpu(made, capsys):
    set_params(made, fp16=True)
    assert refused("train", capsys).startswith("error: fp16: true: needs a CUDA GPU")


def test_the_table_is_long():
    assert len(STATES) >= 45
