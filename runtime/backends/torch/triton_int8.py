"""The int8 product of a few rows on CUDA GPUs, in Triton; it reads every weight once, as one byte.

torch's packed product assigns each output there to a single thread, which reads its whole row (as of torch 2.13).
"""

import torch
import triton
import triton.language as tl

# The smallest tile of a matrix instruction; rows beyond those given are masked.
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
        column = start + tl.arange(0, tile_inputs)
        values = tl.load(x + row * inputs + column[None, :], mask=(row < rows) & (column[None, :] < inputs), other=0.0)
        inside = (output[None, :] < outputs) & (column[:, None] < inputs)
        integers = tl.load(weight + output[None, :] * inputs + column[:, None], mask=inside, other=0)
        total += tl.dot(values, integers.to(values.dtype))  # 16-bit floats represent int8 exactly
    total *= tl.load(steps + output, mask=output < outputs, other=0.0)[None, :]
    target = out + row * outputs + output[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(row < rows) & (output[None, :] < outputs))


def int8_product(x: torch.Tensor, weight: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """``x @ (weight * steps[:, None])^T``, accumulated in float32 and returned in the type of ``x``.

    Shapes: ``x`` ``[n, in]`` of a 16-bit float type with n up to 16, ``weight`` int8 ``[out, in]``, ``steps`` float32
    ``[out]``.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0]
    out = x.new_empty(rows, outputs)
    _kernel[(triton.cdiv(outputs, OUTPUTS),)](
        x.contiguous(), weight, steps, out, rows, outputs, inputs, ROWS, OUTPUTS, INPUTS
    )
    return out
