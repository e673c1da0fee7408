"""Models and sources that cannot be used, as tables: fetch refuses each in one line and keeps its earlier outputs."""

import json
import shutil

import pytest

from tests.support.project import set_params
from tests.support.refused import edit_json, refused, truncate
from tests.support.rows import small_trees, write_jsonl


def pickled(model) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def sharded(model) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


MODELS = {
    "no config": (lambda m: (m / "config.json").unlink(), "has no config.json"),
    "a config that is no JSON": (lambda m: (m / "config.json").write_text("{"), "holds no model of a known type"),
    "an empty config": (lambda m: (m / "config.json").write_text("{}"), "holds no model of a known type"),
    "a config of an unknown type": (lambda m: edit_json(m / "config.json", model_type="new"), "model of a known type"),
    "a config with remote code": (
        lambda m: edit_json(m / "config.json", model_type="new", auto_map={"AutoConfig": "evil.Config"}),
        "code of a model's repository is never run",
    ),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "has no *.safetensors"),
    "pickled weights": (pickled, "pickled weights (.bin) are never loaded"),
    "a missing shard": (sharded, "model-00002-of-00002.safetensors is missing"),
    "an index that is no JSON": (
        lambda m: (m / "model.safetensors.index.json").write_text("{"),
        "is not valid JSON",
    ),
    "an index of nothing": (lambda m: (m / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    "truncated weights": (lambda m: truncate(m / "model.safetensors"), "model.safetensors is damaged"),
    "weights cut to their header": (lambda m: truncate(m / "model.safetensors", 0.001), "model.safetensors is damaged"),
    "empty weights": (lambda m: truncate(m / "model.safetensors", 0), "model.safetensors is damaged"),
    "an HTML page as weights": (lambda m: (m / "model.safetensors").write_text("<html>404</html>"), "is damaged"),
    "no tokenizer": (lambda m: [p.unlink() for p in m.glob("tokenizer*")], "has no tokenizer*.json"),
    "a tokenizer that is no JSON": (lambda m: (m / "tokenizer.json").write_text("{"), "no tokenizer that can be read"),
    "a damaged GGUF": (lambda m: (m / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 60), "no GGUF model that can be"),
    "two GGUFs": (lambda m: [(m / f"{n}.gguf").write_bytes(b"GGUF") for n in "ab"], "2 GGUF files"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_used_is_refused_when_it_is_fetched(case, folder, tiny_llama, capsys):
    damage, said = MODELS[case]
    damage(shutil.copytree(tiny_llama, folder / "models/local/tiny"))
    line = refused("fetch_model", capsys)
    assert said in line and ".partial" not in line, line


LOCAL = {
    "no data": ("fetch", {"dataset": "file:data/local/none.jsonl"}, "data/local/none.jsonl does not exist. Correct"),
    "a name misspelt": ("fetch", {"dataset": "file:data/local/tree.jsonl"}, "exist. Did you mean trees.jsonl? Correct"),
    "no model": ("fetch_model", {"base_model": "file:models/local/none"}, "models/local/none does not exist"),
    "a file outside": ("fetch", {"dataset": "file:params.yaml"}, "is outside data/local"),
    "a model beside the data": ("fetch_model", {"base_model": "file:data/local/model"}, "is outside models/local"),
    "another version": ("fetch", {"dataset_revision": "sha256:" + "0" * 64}, "is not the pinned sha256:000"),
}


@pytest.mark.parametrize("case", LOCAL)
def test_a_source_that_is_not_as_named(case, folder, tiny_llama, capsys):
    stage, changes, said = LOCAL[case]
    for path in ("models/local/tiny", "data/local/model"):
        shutil.copytree(tiny_llama, folder / path)
    write_jsonl(folder / "data/local/trees.jsonl", small_trees(2))
    set_params(folder, **changes)
    assert said in refused(stage, capsys)


def test_the_table_is_long():
    assert sum(map(len, (MODELS, LOCAL))) >= 20
