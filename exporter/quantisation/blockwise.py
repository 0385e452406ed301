"""Weights as blocks of 4 or 8 bits, which ONNX Runtime's MatMulNBits and GatherBlockQuantized compute with.

A value is ``(q - 2**(bits - 1)) * scale``, with ``q`` of 0 to ``2**bits - 1`` and a float32 scale for each block of a
row. The steps reach one further below than above, and a negative scale turns them over.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Values that are computed with at once: they stay in the processor's cache.
PIECE = 1 << 16
# How many steps are tried for the largest magnitude of a block. More than there are cut it off, which makes the others
# finer. Ten times as many take ten times as long, and save little more.
SEARCHED = {4: (6.8, 7.0, 7.4, 7.8, 8.0, 8.4, 9.0), 8: (124.0, 126.0, 127.0, 128.0, 129.0)}
# What is best where nothing is known of the inputs. Less squared error of 4 bits is a worse model then (measured,
# benchmarks/nbits.py), though the weights are closer.
STEPS = {4: (8.0,), 8: SEARCHED[8]}


def quantise(
    values: "torch.Tensor", bits: int, block: int, steps: tuple[float, ...] = ()
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Uint8 ``[rows, blocks, block * bits / 8]`` and float32 ``[rows, blocks]`` of float32 ``[rows, columns]``.

    Of 4 bits, the first of two values is in a byte's low half. The last block of a row ends with zeros.
    The scale is the one with the least squared error of those that ``steps`` (unless given, :data:`STEPS`) lead to; a
    single one is taken as it is: ``(2 ** (bits - 1),)`` rounds to nearest without a search.
    """
    import torch
    from torch.nn.functional import pad

    rows, columns = values.shape
    blocks = -(-columns // block)
    packed = torch.empty(rows, blocks, block * bits // 8, dtype=torch.uint8)
    scales = torch.empty(rows, blocks)
    some = max(1, PIECE // max(columns, 1))
    parts = (torch.split(tensor, some) for tensor in (values, packed, scales))
    for piece, bytes_, found in zip(*parts, strict=True):
        # Blocks side by side: what is summed over a block is then added up row by row.
        turned = pad(piece, (0, blocks * block - columns)).reshape(-1, block).T.contiguous()
        q, scale = quantise_blocks(turned, bits, steps or STEPS[bits])
        bytes_.copy_(pack(q.T.contiguous(), bits).reshape(bytes_.shape))
        found.copy_(scale.reshape(found.shape))
    return packed, scales


def pack(q: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Uint8 values as they are stored, along the last axis."""
    return q[..., ::2] | q[..., 1::2] << 4 if bits == 4 else q


def dequantise(packed: "torch.Tensor", scales: "torch.Tensor", bits: int, columns: int) -> "torch.Tensor":
    """The values, float32 ``[rows, columns]``, that a quantised matrix stands for."""
    import torch

    if bits == 4:
        packed = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(2)
    values = packed.float().sub_(2 ** (bits - 1)).mul_(scales[..., None])
    return values.flatten(1)[:, :columns]


def quantise_blocks(
    values: "torch.Tensor", bits: int, steps: tuple[float, ...], weights: "torch.Tensor | None" = None
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Uint8 ``[block, n]`` and float32 ``[n]`` of float32 ``[block, n]``; ``weights`` of errors, ``[block, 1]``."""
    import torch

    half = 2 ** (bits - 1)
    low, high = values.amin(0), values.amax(0)
    extreme = torch.where(high > -low, high, low)
    # Not by way of 1 / extreme, which very small values would make infinite.
    unit = values / -extreme.masked_fill(extreme == 0, 1.0)
    step = torch.full_like(extreme, 1 / steps[0])
    least = torch.full_like(extreme, torch.inf)
    for count in steps if len(steps) > 1 else ():
        rest = unit * count
        q = rest.round().clamp_(-half, half - 1)
        rest.sub_(q)
        # With the best scale for these q, of which rest / q is what 1 / count lacks. In steps, and of the rest alone:
        # of the values themselves, float32 would lose the errors of 8 bits.
        weighed = q if weights is None else q * weights
        square = (q * weighed).sum(0)
        lacking = (weighed * rest).sum(0) / square
        squares = rest.square_() if weights is None else rest.square_().mul_(weights)
        error = (squares.sum(0) - lacking.square() * square) / count**2
        better = error < least
        least = torch.where(better, error, least)
        step = torch.where(better, (1 + lacking) / count, step)
    scales = step * -extreme
    q = unit.div_(step).round_().clamp_(-half, half - 1).add_(half)
    return q.to(torch.uint8), scales
