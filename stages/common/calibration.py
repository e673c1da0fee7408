"""What a model's matrix products read on real conversations, and what rounding each of them costs."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from stages.common.errors import StageError
from stages.common.gptq import Grid, Rounded, round_gptq, round_nearest

HEAD = "lm_head"
# The exported graph multiplies by q, k and v at once, and calls all models' attention output the same.
EXPORTED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "dense": "o_proj"} | {
    name: name for name in ("o_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")
}
SAME_INPUT = {"up_proj": "gate_proj"}  # whose second moments are another's


@dataclass(frozen=True)
class Product:
    """A matrix product of the exported graph: linear layers that read the same input. `layer` is -1 for the head."""

    layer: int
    name: str

    def __str__(self) -> str:
        return self.name if self.name == HEAD else f"{self.layer}.{self.name}"


Linears = dict[Product, list[nn.Linear]]


def products_of(model: PreTrainedModel) -> Linears:
    """The matrix products of a Llama or Phi model, layer by layer. Raises StageError for a model of another build."""
    found: Linears = {}
    names = set()
    for number, layer in enumerate(getattr(model.base_model, "layers", [])):
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                names.add(name := path.rpartition(".")[2])
                found.setdefault(Product(number, EXPORTED.get(name, name)), []).append(module)
    if not found or names - set(EXPORTED) or not isinstance(model.get_output_embeddings(), nn.Linear):
        raise StageError(f"export_method: gptq cannot read the layers of a {model.config.model_type} model. Take rtn.")
    found[Product(-1, HEAD)] = [model.get_output_embeddings()]
    return found


def kept_products(products: Linears, names: Sequence[str]) -> set[Product]:
    """The products of these names. Raises StageError for a name that the model has not."""
    there = {product.name for product in products}
    if unknown := [name for name in names if name not in there]:
        raise StageError(f"export_int8_layers: the model has no {unknown[0]}. It has {', '.join(sorted(there))}.")
    return {product for product in products if product.name in names}


def check_grids(products: Linears, grids: tuple[Grid, Grid], kept: set[Product], bits: float | None) -> None:
    """Raise StageError where the exported graph cannot hold such a grid, or where no choice of layers has so few bits.

    The builder packs the 4-bit zero points of all rows at once: a row must have an even number of them.
    """
    few, many = grids
    for product, linears in products.items():
        blocks = -(-linears[0].in_features // few.block)
        if product not in kept and not few.symmetric and blocks % 2:
            raise StageError(
                f"export_block_size: {few.block}: {product} has {blocks} blocks in a row. Zero points need an even "
                "number. Take another size, or export_symmetric: true."
            )
    sizes = sizes_of(products)
    share = sum(sizes[product] for product in kept) / sum(sizes.values())
    if bits is not None and bits < (least := few.bits_a_weight + share * (many.bits_a_weight - few.bits_a_weight)):
        raise StageError(
            f"export_bits: {bits}: must be at least {least:.2f}, with export_int8_layers alone in 8 bits, or null."
        )


def sizes_of(products: Linears) -> dict[Product, int]:
    """Weights of each product."""
    return {product: sum(linear.weight.numel() for linear in linears) for product, linears in products.items()}


def weight_of(linears: Sequence[nn.Linear]) -> torch.Tensor:
    return torch.cat([linear.weight.data for linear in linears]).float()


def padded(weight: torch.Tensor, block: int) -> torch.Tensor:
    """With columns of zeros, up to full blocks, as the exported graph has them."""
    return functional.pad(weight, (0, -weight.shape[1] % block))


def costs(
    model: PreTrainedModel, products: Linears, conversations: Sequence[Sequence[int]], grid: Grid, seed: int
) -> dict[Product, float]:
    """How much rounding each product to the nearest value would raise the loss: nats a token, to second order.

    The second-order term of the loss is estimated by the Fisher information: the squared product of the gradient and
    the rounding's error in a layer's output, averaged over tokens that are drawn from the model itself
    (Kunstner et al., 2019, https://arxiv.org/abs/1905.12558).
    """
    found = dict.fromkeys(products, 0.0)
    inputs: dict[nn.Module, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(seed)

    def remember(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs[module] = args[0].detach()

    def measure(product: Product) -> Callable[[nn.Module, Any, tuple[torch.Tensor, ...]], None]:
        def hook(module: nn.Module, _: Any, gradients: tuple[torch.Tensor, ...]) -> None:
            weight = padded(module.weight.data.float(), grid.block)
            error = (round_nearest(weight, grid).weight() - weight)[:, : module.in_features]
            shift = (gradients[0] * functional.linear(inputs.pop(module), error)).sum(-1)
            found[product] += 0.5 * float(shift.square().sum())

        return hook

    hooks = []
    for product, linears in products.items():
        for linear in linears:
            hooks.append(linear.register_forward_pre_hook(remember))
            hooks.append(linear.register_full_backward_hook(measure(product)))
    tokens = 0
    try:
        for ids in tqdm(conversations, desc="which layers need 8 bits", unit="conv"):
            embedded = model.get_input_embeddings()(torch.tensor([list(ids)])).detach().requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
            functional.cross_entropy(logits, drawn, reduction="sum").backward()
            tokens += len(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return {product: cost / tokens for product, cost in found.items()}


def choose_bits(
    cost: dict[Product, float], sizes: dict[Product, int], grids: tuple[Grid, Grid], kept: set[Product], bits: float
) -> set[Product]:
    """The products that get the second grid, of more bits, instead of the first: those of `kept`, and then those whose
    weights cost most each, as long as the mean over all weights stays within `bits`."""
    few, many = (grid.bits_a_weight for grid in grids)
    room = (bits - few) * sum(sizes.values()) - (many - few) * sum(sizes[product] for product in kept)
    chosen = set(kept)
    for product in sorted(set(cost) - kept, key=lambda p: cost[p] / sizes[p], reverse=True):
        if (needed := (many - few) * sizes[product]) <= room:
            chosen.add(product)
            room -= needed
    return chosen


@torch.no_grad()
def round_all(
    model: PreTrainedModel, products: Linears, conversations: Sequence[Sequence[int]], grids: dict[Product, Grid]
) -> Iterator[tuple[Product, Rounded]]:
    """Round each product by GPTQ, layer by layer; `model` has the rounded weights afterwards.

    A layer's inputs come from the rounded layers before it. A product whose grid has 8 bits or more is rounded to the
    nearest value, which costs next to nothing.
    """
    runs = _first_inputs(model, conversations)
    for number, layer in enumerate(tqdm(model.base_model.layers, desc="rounding", unit="layer")):
        inside = {product: linears for product, linears in products.items() if product.layer == number}
        yield from _round(inside, _moments(inside, layer, runs), grids)
        runs = [(_outputs(layer, run), run[1]) for run in runs]
    head = {product: linears for product, linears in products.items() if product.name == HEAD}
    norm = getattr(model.base_model, "norm", None) or model.base_model.final_layernorm
    reads = [norm(hidden)[0].float() for hidden, _ in runs]
    yield from _round(head, dict.fromkeys(head, sum(x.T @ x for x in reads)), grids)


Run = tuple[torch.Tensor, dict[str, Any]]  # a conversation's hidden states, and a layer's other arguments


class _Enough(Exception):
    """Raised in a forward pass that has shown what it should."""


def _first_inputs(model: PreTrainedModel, conversations: Sequence[Sequence[int]]) -> list[Run]:
    """What the first layer reads of each conversation."""
    runs: list[Run] = []

    def take(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        runs.append((hidden, kwargs))
        raise _Enough

    hook = model.base_model.layers[0].register_forward_pre_hook(take, with_kwargs=True)
    for ids in conversations:
        with contextlib.suppress(_Enough):
            model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    hook.remove()
    return runs


def _outputs(layer: nn.Module, run: Run) -> torch.Tensor:
    given = layer(run[0], **run[1])
    return given if isinstance(given, torch.Tensor) else given[0]


def _moments(inside: Linears, layer: nn.Module, runs: Sequence[Run]) -> dict[Product, torch.Tensor]:
    """The sum of x xᵀ over what each product of a layer reads."""
    found: dict[Product, torch.Tensor] = {}
    hooks = []

    def add(product: Product) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            reads = args[0][0].float()
            found[product] = found.get(product, 0) + reads.T @ reads

        return hook

    for product, linears in inside.items():
        if product.name not in SAME_INPUT:
            hooks.append(linears[0].register_forward_pre_hook(add(product)))
    for run in runs:
        _outputs(layer, run)
    for each in hooks:
        each.remove()
    shared = {p: found[Product(p.layer, SAME_INPUT[p.name])] for p in inside if p.name in SAME_INPUT}
    return found | shared


def _round(
    inside: Linears, moments: dict[Product, torch.Tensor], grids: dict[Product, Grid]
) -> Iterator[tuple[Product, Rounded]]:
    for product, linears in inside.items():
        grid, weight = grids[product], weight_of(linears)
        columns = weight.shape[1]
        weight = padded(weight, grid.block)
        if grid.bits < 8:
            more = weight.shape[1] - columns
            rounded = round_gptq(weight, functional.pad(moments[product], (0, more, 0, more)), grid)
        else:
            rounded = round_nearest(weight, grid)
        yield product, rounded
        rows = [linear.out_features for linear in linears]
        for linear, part in zip(linears, rounded.weight()[:, :columns].split(rows), strict=True):
            linear.weight.data.copy_(part)
