"""Rounding to few bits: the grid, the nearest value, and GPTQ against a search over all roundings."""

import itertools
from dataclasses import replace

import pytest
import torch

from stages.common.errors import StageError
from stages.common.gptq import DAMPING, Grid, round_gptq, round_nearest

GRIDS = [Grid(bits, block, symmetric) for bits in (4, 8) for block in (16, 32) for symmetric in (True, False)]


def random_weight(rows: int = 6, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def moments_of(columns: int, tokens: int = 200) -> torch.Tensor:
    """Of inputs that hang together, so that one column can make up for another."""
    generator = torch.Generator().manual_seed(2)
    mixed = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return mixed.T @ mixed


def loss(weight: torch.Tensor, rounded: torch.Tensor, moments: torch.Tensor) -> float:
    """The squared error of the outputs, over the inputs behind `moments`."""
    error = rounded - weight
    return float((error @ moments * error).sum())


@pytest.mark.parametrize("grid", GRIDS)
def test_a_rounded_weight_is_within_its_grid(grid):
    weight = random_weight()
    rounded = round_nearest(weight, grid)
    assert rounded.integers.shape == weight.shape and rounded.scales.shape == (6, 64 // grid.block)
    assert int(rounded.integers.max()) <= grid.top and rounded.integers.dtype == rounded.zeros.dtype == torch.uint8
    step = rounded.scales.repeat_interleave(grid.block, 1)
    assert ((rounded.weight() - weight).abs() <= 0.51 * step + (0 if grid.symmetric else step / 2)).all()
    if grid.symmetric:
        assert (rounded.zeros == 2 ** (grid.bits - 1)).all()


def test_what_is_on_a_grid_stays():
    weight = torch.tensor([[-8.0, 7.0, 3.0, 0.0] * 4]) * 0.25
    for grid in (Grid(4, 16, True), Grid(4, 16, False)):
        assert torch.allclose(round_nearest(weight, grid).weight(), weight, atol=1e-6)
        assert torch.allclose(round_gptq(weight, torch.eye(16), grid).weight(), weight, atol=1e-6)


def test_a_block_of_zeros_is_zero():
    weight = torch.zeros(2, 32)
    for rounded in (round_nearest(weight, Grid(4, 16, False)), round_gptq(weight, torch.eye(32), Grid(4, 16, False))):
        assert (rounded.weight() == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_loses_much_less_than_the_nearest_value(symmetric):
    weight, moments, grid = random_weight(32), moments_of(64), Grid(4, 16, symmetric)
    nearest = loss(weight, round_nearest(weight, grid).weight(), moments)
    assert loss(weight, round_gptq(weight, moments, grid).weight(), moments) < 0.6 * nearest


def test_with_independent_inputs_gptq_gives_the_nearest_values():
    """But a few, because the scales are fitted once more afterwards."""
    weight, grid = random_weight(), Grid(4, 16, False)
    rounded = round_gptq(weight, torch.eye(64), grid)
    scale, zero = (x.float().repeat_interleave(16, 1) for x in (rounded.scales, rounded.zeros))
    nearest = (torch.round(weight / scale) + zero).clamp(0, 15)
    assert (nearest - rounded.integers).abs().max() <= 1
    assert (nearest == rounded.integers).float().mean() > 0.95
    assert loss(weight, rounded.weight(), torch.eye(64)) <= loss(
        weight, round_nearest(weight, grid).weight(), torch.eye(64)
    )


def test_gptq_comes_near_the_best_of_all_roundings():
    """Four columns: all 16^4 integers by hand, on the same scales."""
    weight, moments = random_weight(8, 64)[:, :4], moments_of(4)
    padded, grid = torch.nn.functional.pad(weight, (0, 12)), Grid(4, 16, False)
    rounded = round_gptq(padded, torch.nn.functional.pad(moments, (0, 12, 0, 12)), grid)
    scale, zero = rounded.scales[:, :1], rounded.zeros[:, :1].float()
    every = torch.tensor(list(itertools.product(range(16), repeat=4)), dtype=torch.float32)

    def errors(integers: torch.Tensor) -> torch.Tensor:
        error = ((integers - zero[:, None]) * scale[:, None] - weight[:, None]).double()
        return ((error @ moments.double()) * error).sum(-1)

    best = float(errors(every[None]).min(1).values.sum())
    nearest = float(errors((torch.round(weight / scale) + zero).clamp(0, 15)[:, None]).sum())
    ours = float(errors(rounded.integers[:, None, :4].float()).sum())
    assert best * (1 - 1e-9) <= ours < best + 0.5 * (nearest - best)


def test_no_other_scales_of_these_integers_lose_less():
    weight, moments, grid = random_weight(), moments_of(64), Grid(4, 16, False)
    rounded = round_gptq(weight, moments, grid)
    moments.diagonal().add_(DAMPING * moments.diagonal().mean())
    least = loss(weight, rounded.weight(), moments)
    generator = torch.Generator().manual_seed(3)
    for size in (0.003, 0.01, 0.03):
        for _ in range(20):
            changed = rounded.scales * (1 + size * torch.randn(rounded.scales.shape, generator=generator))
            assert loss(weight, replace(rounded, scales=changed).weight(), moments) > least


def test_an_input_that_is_never_there_is_no_obstacle():
    moments = moments_of(64)
    moments[3] = moments[:, 3] = 0
    assert torch.isfinite(round_gptq(random_weight(), moments, Grid(4, 16, False)).weight()).all()


def test_moments_that_cannot_be_inverted_are_one_error():
    with pytest.raises(StageError, match="cannot be inverted. Raise export_calibration_tokens"):
        round_gptq(random_weight(), -moments_of(64), Grid(4, 16, False))


def test_the_mean_bits_of_a_weight():
    assert Grid(4, 32, True).bits_a_weight == 4.5
    assert Grid(4, 32, False).bits_a_weight == 4.625
    assert Grid(8, 64, False).bits_a_weight == 8.375
