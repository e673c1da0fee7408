"""Calibration on tiny models: what layers read, what rounding costs, and the exported model has the rounded weights."""

import sys

import pytest
import torch
from transformers import Phi3Config

from stages.common.artifacts import digest_files
from stages.common.calibration import (
    HEAD,
    Product,
    check_grids,
    choose_bits,
    costs,
    kept_products,
    products_of,
    round_all,
)
from stages.common.errors import StageError
from stages.common.exported import Exported
from stages.common.gptq import Grid, round_nearest
from stages.common.model_files import empty_model
from stages.common.models import load_model
from stages.common.nbits import pack, put_weights
from stages.export import build, grids_of, matmul_name
from tests.support.params import export_params

FEW, MANY = Grid(4, 16, False), Grid(8, 16, False)


def conversations(count: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 300, (20 + i,), generator=generator).tolist() for i in range(count)]


@pytest.fixture(params=["llama", "phi"])
def folder(request):
    return request.getfixturevalue(f"tiny_{request.param}")


def loaded(folder):
    return load_model(folder, torch.float32).eval().requires_grad_(False)


def mean_divergence(model, other) -> float:
    """Kullback-Leibler divergence of the next token, nats a token."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids in conversations():
            p, q = (m(torch.tensor([ids])).logits[0].log_softmax(-1) for m in (model, other))
            total, tokens = total + float((p.exp() * (p - q)).sum()), tokens + len(ids)
    return total / tokens


def farthest(exported: Exported, model) -> float:
    """The greatest difference of logits, as a share of the greatest logit."""
    found = 0.0
    for ids in conversations(3):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0]
        found = max(
            found, float((torch.from_numpy(exported.logits(ids)) - expected).abs().max() / expected.abs().max())
        )
    return found


def test_products_are_those_of_the_exported_graph(tiny_llama, tiny_phi):
    names = ["qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    expected = [Product(layer, name) for layer in (0, 1) for name in names] + [Product(-1, HEAD)]
    assert list(products_of(loaded(tiny_llama))) == expected
    assert {p.name for p in products_of(loaded(tiny_phi))} == {"qkv_proj", "o_proj", "fc1", "fc2", HEAD}


def test_a_model_of_another_build_is_one_error(tiny_gpt2):
    with pytest.raises(StageError, match="cannot read the layers of a gpt2 model. Take rtn"):
        products_of(loaded(tiny_gpt2))
    # Phi-3's one layer for gate and up is two in the exported graph.
    fused = Phi3Config(num_hidden_layers=1)
    with pytest.raises(StageError, match="cannot read the layers of a phi3 model. Take rtn"):
        products_of(empty_model(fused))


def test_parameters_that_the_model_cannot_have_are_one_error(tiny_llama):
    products = products_of(loaded(tiny_llama))
    with pytest.raises(StageError, match="export_int8_layers: the model has no fc1. It has down_proj, gate_proj"):
        kept_products(products, ["lm_head", "fc1"])
    kept = kept_products(products, ["lm_head"])
    with pytest.raises(StageError, match=r"export_block_size: 64: 0.qkv_proj has 1 blocks in a row. Zero points need"):
        check_grids(products, (Grid(4, 64, False), Grid(8, 64, False)), kept, None)
    check_grids(products, (Grid(4, 64, True), Grid(8, 64, True)), kept, None)
    with pytest.raises(
        StageError, match=r"export_bits: 4.5: must be at least \d+\.\d\d, with export_int8_layers alone"
    ):
        check_grids(products, (FEW, MANY), kept, 4.5)
    check_grids(products, (FEW, MANY), kept, 10)


def test_eight_bits_have_longer_blocks_where_rows_have_room(tiny_llama):
    products = products_of(loaded(tiny_llama))  # rows of 64 and more
    for block, longer in ((16, 32), (32, 64), (64, 64)):
        params = export_params(export_block_size=block, export_symmetric=False)
        assert grids_of(params, products) == (Grid(4, block, False), Grid(8, longer, True))


def test_costs_are_near_the_divergence_that_rounding_brings(folder):
    """Each product rounded alone: the second-order estimate against the divergence of the next tokens."""
    model = loaded(folder)
    products = products_of(model)
    estimated = costs(model, products, conversations(), FEW, 0)
    again = costs(model, products, conversations(), FEW, 0)
    assert estimated == again and all(value > 0 for value in estimated.values())
    for product in products:
        other = loaded(folder)
        for linear in products_of(other)[product]:
            linear.weight.data = round_nearest(linear.weight.data, FEW).weight()
        measured = mean_divergence(model, other)
        if product.name != HEAD or not model.config.tie_word_embeddings:  # tied: the input embeddings change, too
            assert 0.3 * measured < estimated[product] < 2 * measured, str(product)


def test_eight_bits_go_where_they_gain_most_within_the_mean():
    a, b, c, head = (Product(0, name) for name in ("qkv_proj", "o_proj", "fc1", HEAD))
    sizes = {a: 100, b: 100, c: 200, head: 400}
    cost = {a: 5.0, b: 1.0, c: 4.0, head: 100.0}
    few, many = FEW.bits_a_weight, MANY.bits_a_weight

    def chosen(share: float, kept=frozenset()) -> set[Product]:
        return choose_bits(cost, sizes, (FEW, MANY), set(kept), few + share * (many - few))

    assert chosen(0) == set() and chosen(1) == set(sizes)
    assert chosen(0.5) == {head}  # the most for each weight
    assert chosen(0.49) == {a, c}  # too large a one is passed over
    assert chosen(0.37) == {a, b}
    assert chosen(0.1, {b}) == {b}
    assert chosen(0.25, {b}) == {a, b}


def test_gptq_diverges_less_than_the_nearest_value(folder):
    model, rounded, nearest = loaded(folder), loaded(folder), loaded(folder)
    products = products_of(rounded)
    grids = {product: MANY if product.name == HEAD else FEW for product in products}
    given = dict(round_all(rounded, products, conversations(), grids))
    assert set(given) == set(products)
    for product, linears in products_of(nearest).items():
        for linear in linears if product.name != HEAD else ():
            linear.weight.data = round_nearest(linear.weight.data, FEW).weight()
    assert 0 < mean_divergence(model, rounded) < 0.8 * mean_divergence(model, nearest)


@pytest.fixture
def warm_builder(warm_python, monkeypatch):
    """The builder runs in a fork of a warm process."""
    monkeypatch.setattr(sys, "executable", str(warm_python))


@pytest.mark.slow
@pytest.mark.usefixtures("warm_builder")
@pytest.mark.parametrize("block, symmetric", [(32, False), (32, True), (128, True)])
@pytest.mark.parametrize("head_bits", [8, 4])
def test_the_exported_model_has_the_rounded_weights(folder, block, symmetric, head_bits, tmp_path):
    """Blocks of 128 are longer than a row of 64: the graph's are filled with zeros."""
    params = export_params(export_block_size=block, export_symmetric=symmetric, export_accuracy_level=1)
    model = loaded(folder)
    products = products_of(model)
    few, many = grids_of(params, products)
    grids = {p: many if p.name == HEAD and head_bits == 8 else few for p in products}
    eight = [matmul_name(p.layer, p.name) for p in products if grids[p].bits == 8]
    rounded = round_all(model, products, conversations(), grids)
    packed = {matmul_name(p.layer, p.name): pack(weight, grids[p]) for p, weight in rounded}
    for name in ("once", "twice"):
        build(folder, tmp_path / name / "onnx", params, eight)
    before = digest_files([tmp_path / "once/onnx"])
    nearest = farthest(Exported(tmp_path / "once/onnx"), model)
    for name in ("once", "twice"):
        put_weights(tmp_path / name / "onnx", packed)
    assert before != digest_files([tmp_path / "once/onnx"]) == digest_files([tmp_path / "twice/onnx"])
    near = 1e-5 if model.config.model_type == "llama" else 2e-2  # the builder computes Phi's approximate GELU exactly
    assert farthest(Exported(tmp_path / "once/onnx"), model) < near < nearest
    for name in (matmul_name(9, "up_proj"), matmul_name(-1, HEAD) if head_bits == 8 else "other"):
        with pytest.raises(ValueError, match=f"has no 4-bit node {name}"):
            put_weights(tmp_path / "once/onnx", {name: next(iter(packed.values()))})
    with pytest.raises(ValueError, match="o_proj/MatMul_Q4 has no room for a weight of shape"):
        put_weights(tmp_path / "once/onnx", {matmul_name(0, "o_proj"): packed[matmul_name(0, "qkv_proj")]})
