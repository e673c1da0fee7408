"""Training on a CPU without work that changes no result: one autograd step a LoRA layer, logits of supervised tokens.

PEFT computes a LoRA layer in nine steps of autograd, and bitsandbytes dequantises its weights in each pass. Here the
layer and its adapter are one step, layers that read the same input share it, and the dequantised weights may be kept.
Results equal PEFT's within float32's rounding. On a GPU the libraries' own kernels do this.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import bitsandbytes.functional as bnb
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PretrainedConfig

from stages.common.masks import UNSUPERVISED

# Layers of one parent that read the same input, by their usual names in transformers.
SHARING_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ADAPTER = "default"  # PEFT's name of the only adapter
CHUNK = 256  # supervised tokens whose logits are held at once: 50 MB for a vocabulary of 49,152
# What some models do to their logits after the output layer; `supervised_nll` does not.
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


Frozen = Callable[[], tuple[Tensor, Tensor | None]]


class LoraStep(torch.autograd.Function):
    """x @ weight.T + bias + scale * (dropped @ a.T) @ b.T, for several layers with the same input.

    `x` and `dropped` (x after the adapter's dropout; None: x itself) have shape (…, in). `frozen` gives the frozen
    weights of all layers, one below the other (sum of outs, in), and their biases. `factors` are all a (rank, in), then
    all b (out, rank). Returns a tensor (…, out) for each layer. It computes in the weights' number format.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, frozen: Frozen, scale: float, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        weight, bias = frozen()
        count = len(factors) // 2
        a = torch.cat(factors[:count]).to(weight.dtype)
        b = [factor.to(weight.dtype) for factor in factors[count:]]
        flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        lora_in = flat if dropped is None else dropped.reshape(flat.shape).to(weight.dtype)
        hidden = lora_in @ a.T
        out = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        parts = out.split([factor.shape[0] for factor in b], dim=1)
        for part, low, factor in zip(parts, hidden.chunk(count, dim=1), b, strict=True):
            part.addmm_(low, factor.T, alpha=scale)
        ctx.save_for_backward(lora_in, hidden, a, *b)
        ctx.frozen = frozen  # not its weights: those that are not kept are dequantised again
        ctx.scale, ctx.dtypes, ctx.has_dropout = scale, (x.dtype, factors[0].dtype), dropped is not None
        return tuple(part.view(*x.shape[:-1], -1) for part in parts)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        lora_in, hidden, a, *b = ctx.saved_tensors
        weight, _ = ctx.frozen()
        dtype, factor_dtype = ctx.dtypes
        shape = (*outer[0].shape[:-1], weight.shape[1])
        grads = [grad.reshape(-1, grad.shape[-1]).to(weight.dtype) for grad in outer]
        weights = weight.split([factor.shape[0] for factor in b])
        low = torch.cat([grad @ factor for grad, factor in zip(grads, b, strict=True)], dim=1).mul_(ctx.scale)
        grad_x = grads[0] @ weights[0]
        for grad, part in zip(grads[1:], weights[1:], strict=True):
            grad_x.addmm_(grad, part)
        grad_dropped = None
        if ctx.has_dropout:
            grad_dropped = (low @ a).view(shape).to(dtype)
        else:
            grad_x.addmm_(low, a)
        # h.T @ g is twice as fast as g.T @ h: the long side of the result lies in memory.
        parts = zip(grads, hidden.chunk(len(b), dim=1), strict=True)
        grad_b = [(part.T @ grad).mul_(ctx.scale).T.to(factor_dtype) for grad, part in parts]
        grad_a = (low.T @ lora_in).to(factor_dtype).chunk(len(b))
        return (grad_x.view(shape).to(dtype), grad_dropped, None, None, *grad_a, *grad_b)


class SharedInput:
    """LoRA layers that read the same input: the first one called computes all, the others take their results."""

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype, keep: bool) -> None:
        self.layers = layers
        self.dtype = dtype
        self.kept = self._dense() if keep else None
        self._of: Tensor | None = None
        self._results: dict[int, Tensor] = {}

    def _frozen(self) -> tuple[Tensor, Tensor | None]:
        return self.kept or self._dense()

    def _dense(self) -> tuple[Tensor, Tensor | None]:
        bases = [layer.get_base_layer() for layer in self.layers]
        weight = torch.cat([dense_weight(base, self.dtype) for base in bases])
        if all(base.bias is None for base in bases):
            return weight, None
        none = [base.weight.new_zeros(base.out_features, dtype=self.dtype) for base in bases]
        bias = [
            zero if base.bias is None else base.bias.data.to(self.dtype) for base, zero in zip(bases, none, strict=True)
        ]
        return weight, torch.cat(bias)

    def forward(self, number: int, x: Tensor) -> Tensor:
        """The output of layer `number` for the input `x`."""
        if self._of is not x or number not in self._results:
            dropout = self.layers[0].lora_dropout[ADAPTER]
            dropped = dropout(x) if isinstance(dropout, nn.Dropout) and dropout.training else None
            factors = [getattr(layer, name)[ADAPTER].weight for name in ("lora_A", "lora_B") for layer in self.layers]
            scale = self.layers[0].scaling[ADAPTER]
            results = LoraStep.apply(x, dropped, self._frozen, scale, *factors)
            self._of, self._results = x, dict(enumerate(results))
        result = self._results.pop(number)
        if not self._results:
            self._of = None
        return result


def dense_weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """The weight of a linear layer, of shape (out, in); one of 4 bits is dequantised."""
    state = getattr(layer.weight, "quant_state", None)
    weight = layer.weight.data if state is None else bnb.dequantize_4bit(layer.weight.data, state)
    return weight.to(dtype)


def fuse_lora(model: PeftModel, dtype: torch.dtype, keep: bool) -> list[SharedInput]:
    """Let the plain LoRA layers of `model` compute by `LoraStep`, in `dtype`; returns their groups.

    `keep`: hold the frozen weights in `dtype`; otherwise they are dequantised in each pass, to the same numbers. Layers
    of another kind (DoRA, embeddings) stay PEFT's.
    """
    fused = []
    for parent in model.modules():
        plain = {name: layer for name, layer in parent.named_children() if _is_plain(layer)}
        groups = [names for names in SHARING_INPUT if all(name in plain for name in names)]
        alone = [(name,) for name in plain if not any(name in names for names in groups)]
        for names in (*groups, *alone):
            shared = SharedInput([plain[name] for name in names], dtype, keep)
            for number, name in enumerate(names):
                plain[name].forward = _forward(shared, number)
            fused.append(shared)
    return fused


def _forward(shared: SharedInput, number: int) -> Any:
    return lambda x, *_, **__: shared.forward(number, x)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is PEFT's LoRA of a linear layer, of no variant (DoRA and the like) and without a bias of B."""
    if not isinstance(layer, LoraLayer) or not isinstance(layer.get_base_layer(), nn.Linear):
        return False
    return ADAPTER in layer.lora_A and ADAPTER not in layer.lora_variant and layer.lora_B[ADAPTER].bias is None


class SupervisedNll(torch.autograd.Function):
    """The sum of the negative log-likelihoods of `labels` (n) under hidden states (n, size) and a frozen output layer.

    The gradient is computed with the loss, chunk by chunk in one buffer: the logits are never held, nor computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        states = hidden.to(weight.dtype)
        grad = torch.empty_like(states)
        buffer = states.new_empty(min(CHUNK, len(states)), len(weight))
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(states), CHUNK):
            part = slice(start, start + CHUNK)
            target = labels[part]
            product = torch.mm(states[part], weight.T, out=buffer[: len(target)])
            logits = (product if bias is None else product.add_(bias)).float()  # in float32 the buffer itself
            largest = logits.amax(dim=1, keepdim=True)
            of_target = logits.gather(1, target[:, None]) - largest
            exponential = logits.sub_(largest).exp_()
            normaliser = exponential.sum(dim=1, keepdim=True)
            total += (normaliser.log() - of_target).sum().double()
            # The gradient of the logits is their probability, less 1 at the target.
            torch.mm(exponential.div_(normaliser).to(weight.dtype), weight, out=grad[part])
            grad[part].sub_(weight[target])
        ctx.save_for_backward(grad)
        ctx.dtype = hidden.dtype
        return total.float()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Any, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * outer).to(ctx.dtype), None, None, None


def supervised_nll(model: PeftModel, batch: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of the negative log-likelihoods of the supervised tokens of a batch, in nats.

    `batch` has input_ids and labels, of shape (conversations, tokens). It is padded on the right: no token sees what
    follows it, so no attention mask is needed. Or it is one row without padding, whose position_ids begin anew with
    each conversation: transformers keeps these apart.
    """
    causal = model.get_base_model()
    head = causal.get_output_embeddings()
    positions, labels = batch.get("position_ids"), batch["labels"][:, 1:]
    output = causal.base_model(input_ids=batch["input_ids"], position_ids=positions, use_cache=False)
    supervised = labels != UNSUPERVISED
    weight, bias = (None if each is None else each.detach().to(dtype) for each in (head.weight, head.bias))
    return SupervisedNll.apply(output.last_hidden_state[:, :-1][supervised], weight, bias, labels[supervised])


def has_plain_head(config: PretrainedConfig) -> bool:
    """Whether a model's logits are those of its output layer, and its loss has no other term."""
    text = config.get_text_config()
    changed = any(getattr(text, name, None) not in (None, 1, 1.0) for name in LOGIT_CHANGES)
    return not changed and not hasattr(text, "output_router_logits")
