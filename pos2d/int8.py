"""Int8 rows as bitsandbytes stores them: pure maths on torch tensors, the same for whoever writes or loads."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STEPS = 127


def quantise_rows(values: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """Int8 ``[n, in]`` and float32 ``[n]`` of float rows ``[n, in]``: the nearest of 255 steps of each row's largest
    magnitude, so that ``steps * scale / 127`` is within half a step of every value. A row of zeros has scale 0."""
    scales = values.abs().amax(dim=1).float()
    # Not by way of 1 / scale, which a row of very small values would make infinite.
    steps = values / scales.to(values.dtype)[:, None] * STEPS
    return steps.masked_fill((scales == 0)[:, None], 0.0).round().char(), scales
