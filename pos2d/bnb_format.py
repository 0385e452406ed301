"""What bitsandbytes stores for a quantised linear layer: names of tensors, block sizes, and the int8 rounding.

``8bit`` is the format of LLM.int8() (arXiv 2208.07339) and ``nf4`` that of QLoRA (arXiv 2305.14314).
"""

from collections.abc import Mapping
from typing import Any, Literal

BnbQuant = Literal["8bit", "nf4"]

# Parts of a layer's tensor names, after the layer's own name.
WEIGHT = "weight"
# 8bit: the largest magnitude of each row, float32 [out], and a byte that names the memory layout (0: plain rows).
SCALES, LAYOUT = "SCB", "weight_format"
# nf4: the largest magnitude of each block, the 16 values of the code, and a JSON text of type and shape.
NF4_ABSMAX, NF4_CODE, NF4_STATE = "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"
STORED_PARTS: Mapping[BnbQuant, tuple[str, ...]] = {
    "8bit": (WEIGHT, SCALES, LAYOUT),
    "nf4": (WEIGHT, NF4_ABSMAX, NF4_CODE, NF4_STATE),
}
# nf4 has a scale for each block of this many inputs, and its kernels need rows in groups of this many.
NF4_BLOCK, NF4_ROWS = 64, 32
# int8 values count steps of this part of a row's largest magnitude.
INT8_STEPS = 127
# Activations above it are multiplied in 16 bits by bitsandbytes' int8 kernel: the default of its papers and loaders.
OUTLIER_THRESHOLD = 6.0


def quantise_rows(values: Any) -> tuple[Any, Any]:
    """Quantise rows to int8 as bitsandbytes does; the argument and the results are torch tensors.

    ``values`` are floats ``[n, in]``. Returns int8 ``[n, in]`` and the scales, float32 ``[n]``: each stored value is
    the nearest of 255 steps of its row's largest magnitude, so that ``int8 * scale / 127`` is within half a step of
    every value. A row of zeros has scale 0.
    """
    scales = values.abs().amax(dim=1).float()
    # Not by way of 1 / scale, which a row of very small values would make infinite.
    steps = values / scales.to(values.dtype)[:, None] * INT8_STEPS
    return steps.masked_fill((scales == 0)[:, None], 0.0).round().char(), scales
