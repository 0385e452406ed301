"""The int8 product of a few rows on CUDA cards, in Triton: every weight is read once, as a byte.

torch's own packed product gives each output to one thread there, which walks along its row alone (as of 2.13).
"""

import torch
import triton
import triton.language as tl

# The least that a matrix instruction takes; what lies beyond the given rows is masked.
ROWS = 16
OUTPUTS, INPUTS = 32, 128


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    steps,
    out,
    rows,
    outputs,
    inputs,
    tile_rows: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_inputs: tl.constexpr,
):
    row = tl.arange(0, tile_rows)[:, None]
    output = tl.program_id(0) * tile_outputs + tl.arange(0, tile_outputs)
    total = tl.zeros((tile_rows, tile_outputs), dtype=tl.float32)
    for start in range(0, inputs, tile_inputs):
        at = start + tl.arange(0, tile_inputs)
        values = tl.load(x + row * inputs + at[None, :], mask=(row < rows) & (at[None, :] < inputs), other=0.0)
        inside = (output[None, :] < outputs) & (at[:, None] < inputs)
        whole = tl.load(weight + output[None, :] * inputs + at[:, None], mask=inside, other=0)
        total += tl.dot(values, whole.to(values.dtype))  # halves hold them exactly
    total *= tl.load(steps + output, mask=output < outputs, other=0.0)[None, :]
    place = out + row * outputs + output[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(row < rows) & (output[None, :] < outputs))


def int8_product(x: torch.Tensor, weight: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """``x @ (weight * steps[:, None])^T``: up to 16 rows ``[n, in]`` of a half type, int8 ``[out, in]``, float32
    ``[out]``; sums in float32, returns the type of ``x``."""
    rows, inputs = x.shape
    outputs = weight.shape[0]
    out = x.new_empty(rows, outputs)
    _kernel[(triton.cdiv(outputs, OUTPUTS),)](
        x.contiguous(), weight, steps, out, rows, outputs, inputs, ROWS, OUTPUTS, INPUTS
    )
    return out
