"""The floor of a training step: the operations that it must do, at the rate of the model's own matrix products."""

import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from bench.turns import seconds
from stages.common.masks import supervised_tokens

PRODUCTS = 9  # timed for a median


Shapes = Counter[tuple[int, int]]  # how many layers have (in, out)


def operations(
    config: PretrainedConfig, rows: pd.DataFrame, targets: Collection[str], rank: int
) -> tuple[dict[str, float], Shapes]:
    """The floating-point operations that one turn must do, by kind; and how many frozen layers have each shape.

    A product of (n, a) and (a, b) takes 2nab. Frozen layers: forward, and the gradient of their input. Attention: two
    products over the tokens before, and twice as much backward. LoRA: two products, and twice as much backward.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes: Shapes = Counter()
    factors = 0
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings():
            shapes[layer.in_features, layer.out_features] += 1
            if name.rpartition(".")[2] in targets:
                factors += rank * (layer.in_features + layer.out_features)
    tokens, supervised = int(rows["length"].sum()), supervised_tokens(rows)
    pairs = sum(int(length) * (int(length) + 1) // 2 for length in rows["length"])
    return {
        "frozen layers": 4.0 * tokens * sum(inner * outer * count for (inner, outer), count in shapes.items()),
        "output layer": 4.0 * supervised * config.hidden_size * config.vocab_size,
        "attention": 12.0 * pairs * config.hidden_size * config.num_hidden_layers,
        "LoRA": 6.0 * tokens * factors,
    }, shapes


def floor_rates(shapes: Shapes, tokens: int, dtype: torch.dtype) -> Iterator[float]:
    """Operations a second of the frozen layers' products (forward, input gradient) over `tokens`, measured anew each
    time."""
    products: list[tuple[Callable[[], object], int]] = []
    for (inner, outer), count in shapes.items():
        x, y, weight = (torch.randn(*size, dtype=dtype) for size in ((tokens, inner), (tokens, outer), (outer, inner)))
        products += [(partial(torch.mm, x, weight.T), count), (partial(torch.mm, y, weight), count)]
    done = sum(4.0 * tokens * inner * outer * count for (inner, outer), count in shapes.items())
    while True:
        yield done / sum(count * statistics.median(seconds(work) for _ in range(PRODUCTS)) for work, count in products)
