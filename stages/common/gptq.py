"""Round weights to few bits: to the nearest value, or so that what a layer gives on real inputs changes least.

A block of weights in a row shares a scale and a zero point, as in onnxruntime's MatMulNBits: a weight is
(integer - zero point) * scale.
GPTQ: Frantar et al., 2022, https://arxiv.org/abs/2210.17323, with scales fixed beforehand and columns in the order of
their second moments, largest first ("static groups" and "act-order" of its authors' code). Afterwards the scales are
fitted to the integers, by least squares.
"""

from dataclasses import dataclass, replace

import torch

from stages.common.errors import StageError

# Of the mean second moment, added to all of them: section 3.3 of the paper. More than there, as few tokens calibrate.
DAMPING = 0.3
LEAST_SCALE = 2.0**-24  # the least number above zero that a float16 can hold
HOLDING = 1e-4  # of a row's mean product of a block with itself
COLUMNS = 64  # whose errors are spread together
SHRINKING = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # ranges that are tried for a block: outliers may be clipped


@dataclass(frozen=True)
class Rounded:
    """A weight of shape (rows, columns) in whole numbers; scales and zeros have shape (rows, blocks)."""

    integers: torch.Tensor  # uint8, as the weight
    scales: torch.Tensor  # float32, but only what a float16 can hold: so they are stored
    zeros: torch.Tensor  # uint8

    def weight(self) -> torch.Tensor:
        """The weight that the numbers stand for, in float32."""
        rows, columns = self.integers.shape
        block = columns // self.scales.shape[1]
        centred = self.integers.reshape(rows, -1, block).float() - self.zeros[..., None].float()
        return (centred * self.scales[..., None]).reshape(rows, columns)


@dataclass(frozen=True)
class Grid:
    """How many bits an integer has, how many weights share a scale, and whether the zero point is in the middle."""

    bits: int
    block: int
    symmetric: bool

    @property
    def top(self) -> int:
        return 2**self.bits - 1

    @property
    def bits_a_weight(self) -> float:
        """The integer's bits, and its share of a float16 scale and a zero point."""
        return self.bits + (16 + (0 if self.symmetric else self.bits)) / self.block


def round_nearest(weight: torch.Tensor, grid: Grid) -> Rounded:
    """Each weight at the nearest of the values between the least and the greatest of its block."""
    blocks = _blocks(weight, grid)
    scales, zeros = _spread(*_range(blocks, grid), grid)
    integers = _integers(blocks, scales, zeros, grid)
    return Rounded(integers.reshape(weight.shape).byte(), scales.squeeze(-1), zeros.squeeze(-1).byte())


def round_gptq(weight: torch.Tensor, moments: torch.Tensor, grid: Grid) -> Rounded:
    """Round column by column; the columns that follow make up for each one's error.

    `moments`, shape (columns, columns): the sum of x xᵀ over the layer's inputs x. Raises StageError where they cannot
    be inverted.
    """
    moments = moments.clone()
    diagonal = moments.diagonal()
    diagonal[diagonal == 0] = 1  # an input that is always zero: its weight does not matter
    diagonal += DAMPING * diagonal.mean()
    scales, zeros = _best_scales(_blocks(weight, grid), grid, diagonal)
    order = diagonal.argsort(descending=True, stable=True)
    spread = _inverse_root(moments[order][:, order])
    # Rows of these are columns of the weight: each is used as a whole.
    left, of_column = weight.float().T[order].contiguous(), (order // grid.block)
    scale, zero = scales.squeeze(-1).T[of_column], zeros.squeeze(-1).T[of_column]
    integers = torch.empty_like(left)
    for start in range(0, len(order), COLUMNS):
        part = slice(start, min(start + COLUMNS, len(order)))
        errors = torch.empty_like(left[part])
        for at in range(part.start, part.stop):
            integers[at] = _integers(left[at], scale[at], zero[at], grid)
            error = (left[at] - (integers[at] - zero[at]) * scale[at]) / spread[at, at]
            left[at + 1 : part.stop] -= spread[at, at + 1 : part.stop, None] * error
            errors[at - start] = error
        left[part.stop :] -= spread[part, part.stop :].T @ errors
    placed = torch.empty_like(integers)
    placed[order] = integers
    rounded = Rounded(placed.T.contiguous().byte(), scales.squeeze(-1), zeros.squeeze(-1).byte())
    return replace(rounded, scales=_fitted_scales(weight.float(), rounded, moments))


def _blocks(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    return weight.float().reshape(len(weight), -1, grid.block)


def _integers(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid) -> torch.Tensor:
    return (torch.round(weight / scale) + zero).clamp_(0, grid.top)


def _range(blocks: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest weight of each block, and zero between them."""
    low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
    if grid.symmetric:
        share = (grid.top - 1) / (grid.top + 1)  # there is one more value below the middle
        high = torch.maximum(high, -low * share)
        low = -high / share
    return low, high


def _spread(low: torch.Tensor, high: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point whose integers reach from `low` to `high`."""
    scale = _stored((high - low) / grid.top)
    return scale, torch.round(-low / scale).clamp(0, grid.top)


def _stored(scales: torch.Tensor) -> torch.Tensor:
    """The nearest scales above zero that a float16 can hold."""
    return scales.clamp(min=LEAST_SCALE).half().float()


def _best_scales(blocks: torch.Tensor, grid: Grid, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each block, shape (rows, blocks, 1): those of the tried ranges with the least error, each
    column's error weighed by its `importance`, shape (columns,)."""
    weighs = importance.reshape(1, -1, grid.block)
    low, high = _range(blocks, grid)
    least = torch.full_like(low, torch.inf)
    best, zeros = _spread(low, high, grid)
    for share in SHRINKING:
        scale, zero = _spread(share * low, share * high, grid)
        rounded = _integers(blocks, scale, zero, grid) - zero
        # The best scale for these integers (least squares) is at least as good.
        fitted = (weighs * rounded * blocks).sum(-1, keepdim=True) / (weighs * rounded.square()).sum(-1, keepdim=True)
        scale = torch.where(fitted > 0, _stored(fitted), scale)
        error = (weighs * (rounded * scale - blocks).square()).sum(-1, keepdim=True)
        better = error < least
        least, best, zeros = (torch.where(better, a, b) for a, b in ((error, least), (scale, best), (zero, zeros)))
    return best, zeros


def _fitted_scales(weight: torch.Tensor, rounded: Rounded, moments: torch.Tensor) -> torch.Tensor:
    """The scales of all blocks of a row together with which its integers give the least error of the outputs."""
    rows, blocks = rounded.scales.shape
    centred = replace(rounded, scales=torch.ones_like(rounded.scales)).weight().reshape(rows, blocks, -1)
    wanted = (centred * (weight @ moments).reshape(centred.shape)).sum(-1)
    block = centred.shape[-1]
    between = torch.empty(rows, blocks, blocks)  # the outputs' products, of each block and each other
    for at, part in enumerate(moments.reshape(blocks, block, blocks, block)):
        between[:, at] = (torch.einsum("ri,ibj->rbj", centred[:, at], part) * centred).sum(-1)
    # A block of zeros has no best scale: this holds it, and hardly moves the others.
    hold = HOLDING * between.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    between.diagonal(dim1=1, dim2=2).add_(hold)
    fitted = torch.linalg.solve(between, wanted + hold * rounded.scales)
    return torch.where(fitted > 0, _stored(fitted), rounded.scales)


def _inverse_root(moments: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse."""
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
        return torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError:
        raise StageError(
            "the second moments of a layer's inputs cannot be inverted. Raise export_calibration_tokens, or set "
            "export_method: rtn."
        ) from None
