"""Quantising a matrix column by column, every error made up for by the columns after it.

The method is GPTQ (Frantar et al., https://arxiv.org/abs/2210.17323), with the scale of a block searched when its turn
comes. What makes up for what is known from the second moments of the layer's inputs.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pos2d.exporter.quantisation.blockwise import SEARCHED, pack, quantise_blocks
from pos2d.graph_recipe import BLOCK_SIZES

if TYPE_CHECKING:
    import torch

# Columns that make up for one another: more cost more, by the square, and help little.
PANEL = 1024
# Columns that hand on their errors one by one, before all of them together do so in one product.
TOGETHER = 32
# What is added to the moments, as a share of their mean: without it, inputs that were hardly seen are trusted too much.
DAMPING = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Curvature:
    """How much errors in each column of a matrix are seen, and in which other columns they are made up for.

    ``power``: mean square of every input, ``[columns]``, in units of their mean; ``factors``: for every panel of
    columns the upper Cholesky factor of the inverse of its damped second moments, ``[panels, length, length]``.
    """

    power: "torch.Tensor"
    factors: "torch.Tensor"


def in_panels(values: "torch.Tensor") -> "torch.Tensor":
    """Panels of ``[rows, columns]``, equally long and at most :data:`PANEL`: ``[panels, rows, length]``, with zeros for
    the columns that the last one lacks. All begin where a block does."""
    from torch.nn.functional import pad

    rows, columns = values.shape
    count = -(-columns // PANEL)
    step = max(BLOCK_SIZES) if count > 1 else 1
    length = -(-columns // (count * step)) * step
    return pad(values, (0, count * length - columns)).reshape(rows, count, length).transpose(0, 1)


def curvature_of(moments: "torch.Tensor", columns: int) -> Curvature:
    """From the second moments of :func:`in_panels` of the inputs, float32 ``[panels, length, length]``."""
    import torch

    power = moments.diagonal(dim1=1, dim2=2).flatten()[:columns]
    mean = power.mean() if power.any() else torch.ones(())
    factors = torch.empty_like(moments)
    for panel, factor in zip(moments, factors, strict=True):
        # One input may be thousands of times as large as the others, which float32 would not stand.
        damped = panel.double() / mean
        damped.diagonal().add_(DAMPING)
        # Turned over, the inverse of a lower factor is the upper factor of the inverse.
        lower = torch.linalg.cholesky(damped.flip(0, 1))
        unit = torch.eye(len(panel), dtype=torch.float64)
        factor.copy_(torch.linalg.solve_triangular(lower, unit, upper=False).flip(0, 1))
    return Curvature(power / mean + DAMPING, factors)


def quantise_compensated(
    values: "torch.Tensor", bits: int, block: int, curvature: Curvature
) -> "tuple[torch.Tensor, torch.Tensor]":
    """As :func:`pos2d.exporter.quantisation.blockwise.quantise`, of float32 ``[rows, columns]``; rows do not depend on
    each other."""
    import torch

    rows, columns = values.shape
    blocks = -(-columns // block)
    half = 2 ** (bits - 1)
    # Panels go side by side, and columns lie in a row each: what is done to them is done to neighbours in memory.
    rest = in_panels(values).permute(2, 0, 1).contiguous()
    length, panels, _ = rest.shape
    weights = in_panels(curvature.power[None]).permute(2, 0, 1)
    scales = torch.empty(-(-length // block), panels, rows)
    q = torch.full((len(scales) * block, panels, rows), half, dtype=torch.uint8)
    for scale, first in zip(scales, range(0, length, block), strict=True):
        here = slice(first, min(first + block, length))
        scale.copy_(quantise_blocks(rest[here], bits, SEARCHED[bits], weights[here])[1])
        _quantise_columns(rest, here, curvature.factors, scale, half, q)
    whole = q.permute(2, 1, 0).reshape(rows, -1)[:, : blocks * block]
    return pack(whole.reshape(rows, blocks, block), bits), scales.permute(2, 1, 0).reshape(rows, -1)[:, :blocks]


def _quantise_columns(
    rest: "torch.Tensor", block: slice, factors: "torch.Tensor", scale: "torch.Tensor", half: int, q: "torch.Tensor"
) -> None:
    """Quantise the columns of ``block``, and change those of ``rest`` that come after them."""
    import torch

    divisor = scale.masked_fill(scale == 0, 1.0)
    for first in range(block.start, block.stop, TOGETHER):
        last = min(first + TOGETHER, block.stop)
        steps, errors = torch.empty(2, last - first, *scale.shape).unbind()
        own = factors[:, first:last, first:last].permute(1, 2, 0)[..., None].contiguous()
        for number, (column, step, error) in enumerate(zip(rest[first:last], steps, errors, strict=True)):
            torch.div(column, divisor, out=step).round_().clamp_(-half, half - 1)
            torch.addcmul(column, step, scale, value=-1, out=error).div_(own[number, number])
            rest[first + number + 1 : last].addcmul_(own[number, number + 1 :], error, value=-1)
        q[first:last] = steps.add_(half)
        for panel, factor in enumerate(factors):
            rest[last:, panel].addmm_(factor[first:last, last:].T, errors[:, panel], alpha=-1)
