"""Block-wise quantisation to 4 or 8 bits, in the format of ONNX Runtime's MatMulNBits and GatherBlockQuantized.

A stored value is ``(q - half) * scale`` with ``half = 2**(bits - 1)``, ``q`` from 0 to ``2**bits - 1``, and a float32
scale for each block of a row. The range of ``q - half``, from ``-half`` to ``half - 1``, reaches one step further below
zero than above; a negative scale mirrors it, so that the value of largest magnitude always has the longer side.

The scale is searched. With ``m`` the value of largest magnitude in a block (with its sign), a *span* is the number of
steps from zero to ``m``: it gives the scale ``-m / span``. ``half`` is round-to-nearest over the whole range, and a
larger span clips ``m`` for finer steps. For the values ``w`` with the error weights ``h`` (1 without any)::

    x = w * span / -m                           the values in steps
    q = clip(round(x), -half, half - 1)         (here without the offset)
    r = x - q
    c = sum(h q r) / sum(h q q)                 (1 + c) / span * -m is the least-squares scale for this q
    error = (sum(h r r) - c**2 sum(h q q)) / span**2

The span with the least error wins, the scale is its least-squares scale, and the values are rounded to it once more.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Values that are quantised at a time, so that they stay in the processor's cache.
CHUNK_ELEMENTS = 1 << 16
# Spans of the scale search, by bits. Ten times as many take ten times as long and save little more.
SEARCHED_SPANS = {4: (6.8, 7.0, 7.4, 7.8, 8.0, 8.4, 9.0), 8: (124.0, 126.0, 127.0, 128.0, 129.0)}
# Spans without calibration. At 4 bits the search gives less squared error of the weights, but a worse model (measured,
# benchmarks/nbits.py).
DEFAULT_SPANS = {4: (8.0,), 8: SEARCHED_SPANS[8]}


def quantise(
    values: "torch.Tensor", bits: int, block_size: int, spans: tuple[float, ...] = ()
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Quantise float32 ``[rows, columns]``: the packed values, uint8 ``[rows, blocks, block_size * bits / 8]``, and the
    scales, float32 ``[rows, blocks]``.

    At 4 bits, the first of two values is in the low half of a byte. The last block of a row is padded with zeros.
    ``spans`` are those of the scale search, :data:`DEFAULT_SPANS` where it is empty; a single one is taken without a
    search, and ``(2 ** (bits - 1),)`` rounds to nearest.
    """
    import torch
    from torch.nn.functional import pad

    rows, columns = values.shape
    blocks = -(-columns // block_size)
    packed = torch.empty(rows, blocks, block_size * bits // 8, dtype=torch.uint8)
    scales = torch.empty(rows, blocks)
    chunk_rows = max(1, CHUNK_ELEMENTS // max(columns, 1))
    chunks = (torch.split(tensor, chunk_rows) for tensor in (values, packed, scales))
    for values_chunk, packed_chunk, scales_chunk in zip(*chunks, strict=True):
        # Blocks are columns here: sums over a block then add whole rows, which vectorises.
        padded = pad(values_chunk, (0, blocks * block_size - columns))
        q, scale = quantise_blocks(padded.reshape(-1, block_size).T.contiguous(), bits, spans or DEFAULT_SPANS[bits])
        packed_chunk.copy_(pack(q.T.contiguous(), bits).reshape(packed_chunk.shape))
        scales_chunk.copy_(scale.reshape(scales_chunk.shape))
    return packed, scales


def pack(q: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Pack uint8 values along the last axis: two in a byte at 4 bits, one at 8."""
    return q[..., ::2] | q[..., 1::2] << 4 if bits == 4 else q


def dequantise(packed: "torch.Tensor", scales: "torch.Tensor", bits: int, columns: int) -> "torch.Tensor":
    """The stored values, float32 ``[rows, columns]``, of the results of :func:`quantise`."""
    import torch

    if bits == 4:
        packed = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(2)
    values = packed.float().sub_(2 ** (bits - 1)).mul_(scales[..., None])
    return values.flatten(1)[:, :columns]


def quantise_blocks(
    values: "torch.Tensor", bits: int, spans: tuple[float, ...], error_weights: "torch.Tensor | None" = None
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Quantise the columns of float32 ``[block_size, ...]``, each of them one block: ``q``, uint8 of the same shape,
    and the scales, float32 ``[...]``.

    ``error_weights``, broadcast to ``values``, are the weights of the squared errors in the scale search.
    """
    import torch

    half = 2 ** (bits - 1)
    low, high = values.amin(0), values.amax(0)
    largest = torch.where(high > -low, high, low)
    # Not multiplied by 1 / largest, which would be infinite for very small values.
    normalised = values / -largest.masked_fill(largest == 0, 1.0)
    # The scale in units of -largest.
    step = torch.full_like(largest, 1 / spans[0])
    least_error = torch.full_like(largest, torch.inf)
    for span in spans if len(spans) > 1 else ():
        residual = normalised * span
        q = residual.round().clamp_(-half, half - 1)
        residual.sub_(q)
        weighted_q = q if error_weights is None else q * error_weights
        q_square = (q * weighted_q).sum(0)
        # Computed from the residuals: in sums over the values themselves, float32 would lose the errors of 8 bits.
        correction = (weighted_q * residual).sum(0) / q_square
        residual_square = residual.square_() if error_weights is None else residual.square_().mul_(error_weights)
        error = (residual_square.sum(0) - correction.square() * q_square) / span**2
        better = error < least_error
        least_error = torch.where(better, error, least_error)
        step = torch.where(better, (1 + correction) / span, step)
    scales = step * -largest
    q = normalised.div_(step).round_().clamp_(-half, half - 1).add_(half)
    return q.to(torch.uint8), scales
