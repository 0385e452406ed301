"""GPTQ: quantise a matrix column by column, and compensate the error of each column in those after it.

This is Algorithm 1 of Frantar et al. (https://arxiv.org/abs/2210.17323). ``W`` is the weight ``[rows, columns]``, ``X``
the layer's inputs ``[tokens, columns]``, ``H = X^T X`` the Hessian of the layer's squared output error (up to a
factor), and ``U`` the upper Cholesky factor of its damped inverse, ``U^T U = H^-1``. For each column ``j``, in order::

    Q[:, j] = quant(W[:, j])
    E[:, j] = (W[:, j] - Q[:, j]) / U[j, j]
    W[:, k] -= E[:, j] * U[j, k]                for every k > j

Columns that share scales form a block (the paper's group). Where the implementation differs from the paper:

- The Hessian is block-diagonal. Columns are split into equal groups of at most :data:`MAX_GROUP_COLUMNS`, and errors
  are compensated within a group only, because the cost grows with the square of a group's length and longer ones help
  little. Groups are independent, so that all of them are quantised in parallel.
- The Hessian is divided by the mean of its diagonal before damping is added, so that one constant and the range of
  float32 fit every layer. ``W`` and ``Q`` do not depend on the scale of ``H``.
- The scales of a block are set when its first column is reached, from weights that are already compensated, as in the
  paper; but they are searched, with the Hessian diagonal as the weights of the squared errors, where the paper takes
  them from minimum and maximum.
- Lazy batch updates are shorter, :data:`LAZY_BATCH` columns, and end where a block ends: the next block's search needs
  up-to-date weights.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pos2d.exporter.quantisation.blockwise import SEARCHED_SPANS, pack, quantise_blocks
from pos2d.recipes import BLOCK_SIZES

if TYPE_CHECKING:
    import torch

# Columns of a group at most.
MAX_GROUP_COLUMNS = 1024
# Columns whose errors update all later columns together, in one matrix product.
LAZY_BATCH = 32
# Added to the Hessian diagonal, as a fraction of its mean. Without it, inputs that calibration hardly saw are trusted
# too much.
DAMPING = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class HessianFactors:
    """The Hessian of a layer in the form that GPTQ needs, in units of the mean of its diagonal.

    ``diagonal``: the damped diagonal, ``[columns]``. ``inverse_factors``: for each column group, the upper Cholesky
    factor of the inverse of its damped Hessian, ``[groups, length, length]``.
    """

    diagonal: "torch.Tensor"
    inverse_factors: "torch.Tensor"


def split_into_groups(matrix: "torch.Tensor") -> "torch.Tensor":
    """Split ``[rows, columns]`` into column groups ``[groups, rows, length]``; the last one is padded with zeros.

    Groups have the same length, at most :data:`MAX_GROUP_COLUMNS`, and begin where a block of any size begins.
    """
    from torch.nn.functional import pad

    rows, columns = matrix.shape
    groups = -(-columns // MAX_GROUP_COLUMNS)
    multiple = max(BLOCK_SIZES) if groups > 1 else 1
    length = -(-columns // (groups * multiple)) * multiple
    return pad(matrix, (0, groups * length - columns)).reshape(rows, groups, length).transpose(0, 1)


def factorise_hessian(hessian: "torch.Tensor", columns: int) -> HessianFactors:
    """Damp and invert the diagonal blocks of a Hessian, float32 ``[groups, length, length]``.

    A block is ``X^T X`` of one group of :func:`split_into_groups`; ``columns`` is their number without padding.
    """
    import torch

    diagonal = hessian.diagonal(dim1=1, dim2=2).flatten()[:columns]
    mean = diagonal.mean() if diagonal.any() else torch.ones(())
    inverse_factors = torch.empty_like(hessian)
    for block, inverse_factor in zip(hessian, inverse_factors, strict=True):
        # In float64: one input may be thousands of times as large as the others, which float32 cannot factorise.
        damped = block.double() / mean
        damped.diagonal().add_(DAMPING)
        # With J the reversal of rows and columns and L L^T = J H J, the factor is U = J L^-1 J: it is upper triangular,
        # U^T U = H^-1, and the inverse itself is never formed.
        lower = torch.linalg.cholesky(damped.flip(0, 1))
        identity = torch.eye(len(block), dtype=torch.float64)
        inverse_factor.copy_(torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1))
    return HessianFactors(diagonal / mean + DAMPING, inverse_factors)


def quantise_with_gptq(
    weight: "torch.Tensor", bits: int, block_size: int, hessian: HessianFactors
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Quantise float32 ``[rows, columns]``; rows do not depend on each other.

    Returns packed values and scales as :func:`pos2d.exporter.quantisation.blockwise.quantise` does.
    """
    import torch

    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    half = 2 ** (bits - 1)
    # [length, groups, rows]: what is computed with one column of every group is contiguous in memory.
    remaining = split_into_groups(weight).permute(2, 0, 1).contiguous()
    diagonal = split_into_groups(hessian.diagonal[None]).permute(2, 0, 1)
    length, groups, _ = remaining.shape
    scales = torch.empty(-(-length // block_size), groups, rows)
    q = torch.full((len(scales) * block_size, groups, rows), half, dtype=torch.uint8)
    for scale, start in zip(scales, range(0, length, block_size), strict=True):
        block = slice(start, min(start + block_size, length))
        scale.copy_(quantise_blocks(remaining[block], bits, SEARCHED_SPANS[bits], diagonal[block])[1])
        _quantise_columns(remaining, block, hessian.inverse_factors, scale, half, q)
    q = q.permute(2, 1, 0).reshape(rows, -1)[:, : blocks * block_size]
    scales = scales.permute(2, 1, 0).reshape(rows, -1)[:, :blocks]
    return pack(q.reshape(rows, blocks, block_size), bits), scales


def _quantise_columns(
    remaining: "torch.Tensor",
    block: slice,
    inverse_factors: "torch.Tensor",
    scale: "torch.Tensor",
    half: int,
    q: "torch.Tensor",
) -> None:
    """Quantise the columns of ``block`` into ``q`` and compensate their errors in the columns of ``remaining`` after
    them."""
    import torch

    divisor = scale.masked_fill(scale == 0, 1.0)
    for start in range(block.start, block.stop, LAZY_BATCH):
        stop = min(start + LAZY_BATCH, block.stop)
        steps, errors = torch.empty(2, stop - start, *scale.shape).unbind()
        # The batch's diagonal block of U, [batch, batch, groups, 1].
        factor = inverse_factors[:, start:stop, start:stop].permute(1, 2, 0)[..., None].contiguous()
        for j, (column, step, error) in enumerate(zip(remaining[start:stop], steps, errors, strict=True)):
            torch.div(column, divisor, out=step).round_().clamp_(-half, half - 1)
            torch.addcmul(column, step, scale, value=-1, out=error).div_(factor[j, j])
            remaining[start + j + 1 : stop].addcmul_(factor[j, j + 1 :], error, value=-1)
        q[start:stop] = steps.add_(half)
        # The lazy update of all columns after the batch: W -= E U.
        for group, inverse_factor in enumerate(inverse_factors):
            remaining[stop:, group].addmm_(inverse_factor[start:stop, stop:].T, errors[:, group], alpha=-1)
