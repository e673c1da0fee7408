"""Fused LoRA layers and the loss of supervised tokens: the results of PEFT and of cross entropy over all tokens."""

import copy

import pytest
import torch

from stages.common.fused import SharedInput, fuse_lora, has_plain_head, supervised_nll
from stages.common.masks import UNSUPERVISED
from tests.support.params import train_params
from tests.support.training import load_tiny

IDS = torch.tensor([[5, 6, 7, 8, 9, 3], [9, 8, 7, 2, 2, 2]])  # the second is padded with 2
LABELS = torch.tensor([[UNSUPERVISED, UNSUPERVISED, 7, 8, 9, 3], [UNSUPERVISED, 8, 7, *[UNSUPERVISED] * 3]])
BATCH = {"input_ids": IDS, "labels": LABELS}
MASK = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])


def adapted(folder, **changes):
    """A tiny 4-bit model whose adapter does something."""
    model = load_tiny(folder, train_params("smollm2-cpu", lora_dropout=0.0, **changes)).train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    return model


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def plain_nll(model) -> torch.Tensor:
    logits = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), LABELS[:, 1:].flatten(), ignore_index=UNSUPERVISED, reduction="sum"
    )


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, grad in theirs.items():
        assert grad.norm() > 0, name
        assert (ours[name] - grad).norm() <= 2e-6 * grad.norm(), name


MODULES = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
MODULES["phi"] = ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]  # with biases


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"load_in_4bit": False}])
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_loss_and_gradients_are_those_of_peft_over_all_tokens(name, changes, keep, request):
    model = adapted(request.getfixturevalue(f"tiny_{name}"), target_modules=MODULES[name], **changes)
    theirs, their_loss = gradients(model, plain_nll(model)), plain_nll(model).item()
    assert sum(len(shared.layers) for shared in fuse_lora(model, torch.float32, keep)) == len(theirs) / 2
    nll = supervised_nll(model, BATCH, torch.float32)
    assert nll.item() == pytest.approx(their_loss, rel=1e-6)
    assert_close(gradients(model, nll), theirs)


def test_kept_weights_change_no_bit(tiny_llama):
    results = []
    for keep in (True, False):
        model = adapted(tiny_llama)
        fuse_lora(model, torch.float32, keep)
        results.append(gradients(model, supervised_nll(model, BATCH, torch.float32)))
    for name, grad in results[0].items():
        assert torch.equal(grad, results[1][name]), name


def test_dropout_is_drawn_once_for_layers_that_share_their_input_and_its_gradient_is_right(tiny_llama):
    model = adapted(tiny_llama)
    layers = model.get_base_model().model.layers[0].self_attn
    shared = SharedInput([layers.q_proj, layers.k_proj], torch.float32, keep=True)
    for layer in shared.layers:
        layer.lora_dropout["default"] = torch.nn.Dropout(0.5)
    x = torch.randn(1, 4, layers.q_proj.in_features, requires_grad=True)
    expected = copy.deepcopy(x.detach()).requires_grad_()
    torch.manual_seed(3)
    sum((shared.forward(number, x) ** 2).sum() for number in (0, 1)).backward()
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(expected, 0.5)
    total = 0.0
    for layer in shared.layers:
        low = layer.lora_A["default"](dropped)
        out = layer.base_layer(expected) + layer.scaling["default"] * layer.lora_B["default"](low)
        total = total + (out**2).sum()
    total.backward()
    assert torch.allclose(x.grad, expected.grad, rtol=1e-5, atol=1e-6)


def test_layers_of_another_kind_stay_pefts(tiny_llama):
    model = adapted(tiny_llama, use_dora=True)
    expected = plain_nll(model).item()
    assert fuse_lora(model, torch.float32, keep=True) == []
    assert supervised_nll(model, BATCH, torch.float32).item() == pytest.approx(expected, rel=1e-6)


def test_a_layer_whose_adapter_has_a_bias_stays_pefts(tiny_llama):
    model = adapted(tiny_llama)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_B["default"].bias = torch.nn.Parameter(torch.ones(layer.out_features))
    expected = plain_nll(model).item()
    assert all(layer not in shared.layers for shared in fuse_lora(model, torch.float32, keep=True))
    assert supervised_nll(model, BATCH, torch.float32).item() == pytest.approx(expected, rel=1e-6)


def test_a_model_that_changes_its_logits_keeps_its_own_loss(tiny_llama):
    config = adapted(tiny_llama).config
    assert has_plain_head(config)
    config.final_logit_softcapping = 30.0
    assert not has_plain_head(config)
