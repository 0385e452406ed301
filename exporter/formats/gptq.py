"""Quantising a matrix column by column, every error made up for by the columns after it.

The method is GPTQ (Frantar et al., https://arxiv.org/abs/2210.17323), with the scale of a block searched when its turn
comes. What makes up for what is known from the second moments of the layer's inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.formats.nbits import SEARCHED, pack, quantise_blocks

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

    ``power``: mean square of every input, ``[columns]``, in units of their mean; ``factors``: for every panel of at
    most :data:`PANEL` columns the upper Cholesky factor of the inverse of its damped second moments.
    """

    power: "torch.Tensor"
    factors: "tuple[torch.Tensor, ...]"


def panels(columns: int) -> list[slice]:
    return [slice(start, min(start + PANEL, columns)) for start in range(0, columns, PANEL)]


def curvature_of(moments: "Sequence[torch.Tensor]") -> Curvature:
    """From the second moments ``X.T @ X`` of the inputs, float32 and panel by panel."""
    import torch

    power = torch.cat([panel.diagonal() for panel in moments])
    mean = power.mean() if power.any() else torch.ones(())
    factors = []
    for panel in moments:
        # One input may be thousands of times as large as the others, which float32 would not stand twice.
        damped = panel.double() / mean
        damped.diagonal().add_(DAMPING)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        factors.append(torch.linalg.cholesky(inverse, upper=True).float())
    return Curvature(power / mean + DAMPING, tuple(factors))


def quantise_compensated(
    values: "torch.Tensor", bits: int, block: int, curvature: Curvature
) -> "tuple[torch.Tensor, torch.Tensor]":
    """As :func:`exporter.formats.nbits.quantise`, of float32 ``[rows, columns]``; rows do not depend on each other."""
    import torch

    rows, columns = values.shape
    blocks = -(-columns // block)
    half = 2 ** (bits - 1)
    q = torch.full((blocks * block, rows), half, dtype=torch.uint8)
    scales = torch.empty(blocks, rows)
    for panel, factor in zip(panels(columns), curvature.factors, strict=True):
        # Columns lie in a row each: what is done to one of them is done to neighbours in memory.
        rest = values[:, panel].T.contiguous()
        weights = curvature.power[panel, None]
        for first in range(0, len(rest), block):
            here = slice(first, min(first + block, len(rest)))
            scale = quantise_blocks(rest[here], bits, SEARCHED[bits], weights[here])[1]
            scales[(panel.start + first) // block] = scale
            _quantise_columns(rest, here, factor, scale, half, q[panel])
    return pack(q.T.reshape(rows, blocks, block), bits), scales.T.contiguous()


def _quantise_columns(
    rest: "torch.Tensor", block: slice, factor: "torch.Tensor", scale: "torch.Tensor", half: int, q: "torch.Tensor"
) -> None:
    """Quantise the columns of ``block``, and change those of ``rest`` that come after them."""
    import torch

    divisor = scale.masked_fill(scale == 0, 1.0)
    for first in range(block.start, block.stop, TOGETHER):
        last = min(first + TOGETHER, block.stop)
        steps, errors = torch.empty(2, last - first, rest.shape[1]).unbind()
        own = factor.diagonal()[first:last].tolist()
        for column, step, error, seen in zip(range(first, last), steps, errors, own, strict=True):
            torch.div(rest[column], divisor, out=step).round_().clamp_(-half, half - 1)
            torch.addcmul(rest[column], step, scale, value=-1, out=error).div_(seen)
            if column + 1 < last:
                rest[column + 1 : last].addr_(factor[column, column + 1 : last], error, alpha=-1)
        q[first:last] = steps.add_(half)
        rest[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
