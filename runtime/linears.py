"""Linear layers over quantised weights, in the formats of bitsandbytes: on torch's own kernels, or on its own."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pos2d.errors import UsageError
from pos2d.int8 import STEPS, quantise_rows
from pos2d.quiet import quietly
from pos2d.recipe import Quant
from runtime.options import Int8Kernel

# Names of a quantised layer's tensors in a file, after the layer's own.
STORED_PARTS: dict[Quant, tuple[str, ...]] = {
    "8bit": ("weight", "SCB", "weight_format"),
    "nf4": ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"),
}
# Activations above it are multiplied in 16 bits by bitsandbytes' int8 kernel: its own default.
OUTLIER_THRESHOLD = 6.0
# torch's packed int8 product is done row by row; from here on widening the weights first is faster (measured on two
# x86-64 cores with AVX-512, where the two meet between 16 and 24 rows).
PACKED_ROWS = 16

Tensors = Mapping[str, torch.Tensor]
Bias = torch.Tensor | None


class Int8Linear(nn.Module):
    """``x @ (weight * scale / 127)^T + bias``: int8 ``[out, in]``, float32 ``[out]``; only the weights are quantised.

    Few bfloat16 rows on a CPU go through torch's packed int8 product, whose scales are bfloat16 too. Anything else is
    multiplied with the weights widened to the type of ``x``, which holds them exactly.
    """

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor, bias: Bias) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.steps = nn.Parameter(scales.float() / STEPS, requires_grad=False)
        self.packed_steps = nn.Parameter(self.steps.bfloat16(), requires_grad=False)
        self.bias = _parameter(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and len(rows) <= PACKED_ROWS:
            found = torch._weight_int8pack_mm(rows, self.weight, self.packed_steps)
        else:
            found = functional.linear(rows, self.weight.to(x.dtype)) * self.steps.to(x.dtype)
        if self.bias is not None:
            found = found + self.bias
        return found.reshape(*x.shape[:-1], -1)


def bnb_int8_linear(weight: torch.Tensor, scales: torch.Tensor, bias: Bias) -> nn.Module:
    """bitsandbytes' own layer over int8 ``[out, in]`` and float32 ``[out]``; it quantises the activations as well."""
    layers = bitsandbytes().nn
    layer: Any = layers.Linear8bitLt(
        weight.shape[1], weight.shape[0], False, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD, device="meta"
    )
    layer.weight = layers.Int8Params(weight, requires_grad=False, CB=weight, SCB=scales)
    layer.bias = _parameter(bias)
    # A new layer is in training mode, where bitsandbytes leaves the activations of a CPU as they are.
    return layer.eval()  # type: ignore[no-any-return]


def bnb_nf4_linear(weight: torch.Tensor, bias: Bias, compute_dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' own layer over a weight of its own type of parameter."""
    layers = bitsandbytes().nn
    layer: Any = layers.Linear4bit(1, 1, False, compute_dtype, quant_type="nf4", device="meta")
    layer.weight, layer.bias = weight, _parameter(bias)
    return layer  # type: ignore[no-any-return]


def stored_linear(tensors: Tensors, quant: Quant, kernel: Int8Kernel, dtype: torch.dtype) -> nn.Module:
    """A layer from the tensors of a quantised file, by their names after the module's."""
    bias = tensors["bias"].to(dtype) if "bias" in tensors else None
    if quant == "8bit":
        return _int8(kernel, tensors["weight"].device)(tensors["weight"], tensors["SCB"], bias)
    stats = {name: tensor for name, tensor in tensors.items() if name.startswith("weight.")}
    weight = bitsandbytes().nn.Params4bit.from_prequantized(
        data=tensors["weight"], quantized_stats=stats, device=tensors["weight"].device
    )
    return bnb_nf4_linear(weight, bias, dtype)


def quantised_linear(tensors: Tensors, quant: Quant, kernel: Int8Kernel, dtype: torch.dtype) -> nn.Module:
    """A layer from a weight ``[out, in]`` in full precision."""
    weight = tensors["weight"]
    bias = tensors["bias"].to(dtype) if "bias" in tensors else None
    if quant == "8bit":
        return _int8(kernel, weight.device)(*quantise_rows(weight.float()), bias)
    packed = bitsandbytes().nn.Params4bit(weight, quant_type="nf4", compress_statistics=False).to(weight.device)
    return bnb_nf4_linear(packed, bias, dtype)


def bitsandbytes() -> Any:
    """Raises:
    UsageError: it is not installed, or cannot be imported here.
    """
    try:
        with quietly("bitsandbytes"):  # it looks for kernels on a model hub, and says that it found none
            import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise UsageError(f"bitsandbytes cannot be imported: {error}; pip install bitsandbytes") from None
    return bitsandbytes


def _int8(kernel: Int8Kernel, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor, Bias], nn.Module]:
    """``auto``: what was measured to be faster; on cards nothing was, and bitsandbytes is made for them."""
    if kernel == "auto":
        kernel = "bnb" if device.type == "cuda" else "weight-only"
    return bnb_int8_linear if kernel == "bnb" else Int8Linear


def _parameter(tensor: Bias) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)
