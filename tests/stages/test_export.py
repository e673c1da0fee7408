"""Exporting: the exported model is the merged one, Phi or Llama; parameters count; a bound that is passed fails."""

import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime_genai
import pandas as pd
import pytest
import torch

from stages.common.artifacts import digest_files, read_json
from stages.common.chat import end_ids
from stages.common.errors import StageError
from stages.common.exported import Exported
from stages.common.generation import greedy_answers
from stages.common.model_files import load_tokenizer
from stages.common.models import load_model
from stages.common.scoring import perplexity_of, score
from stages.export import build, check_loss, export, headline, kept_names, matmul_name, quantisation
from tests.support.params import export_params

PROMPT = list(range(20, 45))
PLAIN = {"export_method": "rtn", "export_bits": None}  # without calibration


@pytest.fixture
def warm_builder(warm_python, monkeypatch):
    """The builder runs in a fork of a warm process."""
    monkeypatch.setattr(sys, "executable", str(warm_python))


@pytest.fixture(params=["llama", "phi"])
def source(request, tmp_path, warm_builder):
    """A tiny model with biases that are not zero, so that one that is lost shows."""
    folder = tmp_path / "model"
    origin = request.getfixturevalue(f"tiny_{request.param}")
    model = load_model(origin, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    load_tokenizer(origin).save_pretrained(folder)
    return SimpleNamespace(folder=folder, recipe={"llama": "smollm2-cpu", "phi": "phi2-oasst1"}[request.param])


def reference_logits(folder) -> np.ndarray:
    with torch.no_grad():
        return load_model(folder, torch.float32)(torch.tensor([PROMPT])).logits[0].numpy()


def stored_scales(path) -> set[int]:
    """The types in which the quantised products' scales and the rotary positions are stored."""
    graph = onnx.load(path, load_external_data=False).graph
    cast = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    names = [node.input[2] for node in graph.node if node.op_type == "MatMulNBits"]
    assert names
    return {types[cast[name]] for name in [*names, "cos_cache", "sin_cache"]}


def by_genai(folder) -> np.ndarray:
    """The logits after the prompt, by the library that the card on the hub names."""
    model = onnxruntime_genai.Model(str(folder))
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=len(PROMPT) + 1)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(np.array([PROMPT], dtype=np.int32))
    return generator.get_output("logits")[0, -1]


@pytest.mark.slow
@pytest.mark.parametrize("precision, near", [("fp32", 1e-3), ("fp16", 0.02), ("int8", 0.1), ("int4", 0.6)])
def test_logits_are_those_of_the_model_it_was_made_from(source, precision, near, tmp_path):
    # Not nearer in fp32: the builder computes Phi's approximate GELU exactly.
    params = export_params(source.recipe, **PLAIN, export_precision=precision)
    export(source.folder, tmp_path / "onnx", params)
    logits = Exported(tmp_path / "onnx").logits(PROMPT)
    expected = reference_logits(source.folder)
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max() < near * np.abs(expected).max()
    if precision.startswith("int"):
        assert stored_scales(tmp_path / "onnx/model.onnx") == {onnx.TensorProto.FLOAT16}
    assert np.abs(by_genai(tmp_path / "onnx") - logits[-1]).max() < 1e-3 * np.abs(logits[-1]).max()
    # The builder's own commit: not that of the git repository around it, which is another with each of its commits.
    made_by = onnx.load(tmp_path / "onnx/model.onnx", load_external_data=False).producer_version
    assert made_by == f"{onnxruntime_genai.__version__}+{onnxruntime_genai.__commit__[:7]}"


@pytest.mark.slow
def test_the_same_bytes_twice_and_other_bytes_by_other_parameters(source, tmp_path):
    start = {**PLAIN, "export_block_size": 32}
    changes = [{}, {}, {"export_block_size": 16}, {"export_symmetric": True}, {"export_accuracy_level": 1}]
    changes += [{"export_method": "k_quant"}, {"export_int8_layers": ["o_proj"]}]
    digests = []
    for i, change in enumerate(changes):
        export(source.folder, tmp_path / str(i) / "onnx", export_params(source.recipe, **{**start, **change}))
        digests.append(digest_files([tmp_path / str(i) / "onnx"]))
    assert digests[0] == digests[1]
    assert len(set(digests)) == len(digests) - 1


@pytest.mark.slow
def test_scores_and_agreement_are_those_of_the_merged_model(tiny_llama, tmp_path, warm_builder):
    build(tiny_llama, tmp_path / "onnx", export_params(**PLAIN, export_precision="fp32"), [])
    exported, model = Exported(tmp_path / "onnx"), load_model(tiny_llama, torch.float32)
    random = np.random.default_rng(0)
    ids = [random.integers(3, 300, size=length).tolist() for length in (9, 30, 21)]
    masks = [[0] * 4 + [1] * (len(x) - 4) for x in ids]
    rows = pd.DataFrame({"input_ids": ids, "assistant_masks": masks, "length": [len(x) for x in ids]})
    ours, theirs = exported.score(rows, "scoring"), score(model, rows, 2, 0)
    pd.testing.assert_frame_equal(ours, theirs, atol=1e-2, check_dtype=False)
    assert abs(perplexity_of(ours) / perplexity_of(theirs) - 1) < 1e-4
    tokenizer = load_tokenizer(tiny_llama)
    prompts = [x[:5] for x in ids]
    answers = greedy_answers(model, tokenizer, prompts, 32, batch_size=1)
    assert exported.agreement(prompts, answers) == 1
    ends = end_ids(tokenizer)
    assert exported.answers(prompts, 32, ends) == answers  # with the end token of those that end
    penalised = greedy_answers(model, tokenizer, prompts, 32, batch_size=1, repetition_penalty=9.0)
    assert exported.answers(prompts, 32, ends, repetition_penalty=9.0) == penalised != answers
    wrong = [list(range(100, 100 + len(answer))) for answer in answers]  # so small a model says one token over and over
    assert exported.agreement(prompts, wrong) < 0.2


@pytest.mark.slow
def test_a_layer_that_the_model_has_not_is_one_line(tiny_phi, tmp_path, warm_builder):
    with pytest.raises(StageError, match="could not be exported as int4.*gate_proj") as error:
        export(tiny_phi, tmp_path / "onnx", export_params(**PLAIN, export_int8_layers=["gate_proj"]))
    assert len(str(error.value).splitlines()) == 1


def test_int8_layers_are_named_in_every_layer_and_only_for_int4():
    params = export_params(**PLAIN, export_int8_layers=["qkv_proj", "fc1", "lm_head"])
    names = kept_names(params, 2)
    weights = quantisation(params, names, True)["weights"]
    assert [override["match"]["name"] for override in weights["overrides"]] == names
    assert names == [
        "/model/layers.0/attn/qkv_proj/MatMul",
        "/model/layers.1/attn/qkv_proj/MatMul",
        "/model/layers.0/mlp/fc1/MatMul",
        "/model/layers.1/mlp/fc1/MatMul",
        matmul_name(0, "lm_head"),
    ]
    assert kept_names(export_params(**PLAIN, export_precision="int8"), 2) == []


def test_the_metrics_are_two_numbers():
    tuned = {"perplexity": 19.5234, "token_agreement": 0.96875, "bytes": 160_049_999, "perplexity_increase": 0.015}
    assert headline(tuned) == {"cpu_ppl": 19.5234, "mb": 160.0}


def test_the_bound():
    check_loss(0.0199, 0.02)
    check_loss(-0.01, 0.02)
    for increase in (0.0201, float("nan")):
        with pytest.raises(StageError, match="more than export_max_perplexity_increase, 2.0%"):
            check_loss(increase, 0.02)


@pytest.mark.slow
def test_the_stage_writes_both_models_or_nothing(finished_project):
    finished_project.remove("models/onnx", "reports/export.json", "reports/exported.json")
    finished_project.set(export_max_perplexity_increase=1e-6, export_precision="int4")
    refused = finished_project.run("stages", "export", check=False)
    said = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert refused.returncode == 1 and len(said) == 1 and "more than export_max_perplexity_increase" in said[0]
    assert not (finished_project.folder / "models/onnx").exists()
    assert not (finished_project.folder / "models/.onnx.partial").exists()

    finished_project.set(export_max_perplexity_increase=10.0)
    assert "% of greedy tokens the same" in finished_project.run("stages", "export").stdout
    onnx = finished_project.folder / "models/onnx"
    report = read_json(finished_project.folder / "reports/exported.json")
    assert read_json(finished_project.folder / "reports/export.json") == headline(report["tuned"])
    for name in ("tuned", "base"):
        card = read_json(onnx / name / "card.json")
        assert card["quality"] == report[name] and card["quality"]["perplexity"] > 1
        assert read_json(onnx / name / "genai_config.json")["model"]["eos_token_id"] == 2
        template = (finished_project.folder / "models/merged/chat_template.jinja").read_bytes()
        assert (onnx / name / "chat_template.jinja").read_bytes() == template
    assert read_json(onnx / "tuned/card.json")["training"]["params"]["max_steps"] == 4
    # Full precision by another way: the same perplexity.
    finished_project.set(**PLAIN, export_precision="fp32", export_base=False)
    finished_project.run("stages", "export")
    quality = read_json(finished_project.folder / "reports/exported.json")["tuned"]
    assert abs(quality["perplexity_increase"]) < 1e-4 and quality["token_agreement"] == 1
    assert not (onnx / "base").exists()
