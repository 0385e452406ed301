"""Linear layers over quantised weights, in the formats of bitsandbytes: on torch's own kernels, or on its own."""

from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pos2d.errors import InputError
from pos2d.int8 import STEPS, quantise_rows
from pos2d.quiet import bitsandbytes
from pos2d.recipe import OUTLIER_THRESHOLD, Quant
from pos2d.runtime.backends.options import Int8Kernel

# Names of a quantised layer's tensors in a file, after the layer's own.
STORED_PARTS: dict[Quant, tuple[str, ...]] = {
    "8bit": ("weight", "SCB", "weight_format"),
    "nf4": ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"),
}
# torch's packed int8 product is done row by row; from here on widening the weights first is faster (measured on two
# x86-64 cores with AVX-512, where the two meet between 16 and 24 rows).
PACKED_ROWS = 16
# It reads beyond the end of rows that are not whole vectors, and computes nonsense or fails (torch 2.13).
PACKED_INPUTS = 16

Tensors = Mapping[str, torch.Tensor]
Bias = torch.Tensor | None


class Int8Linear(nn.Module):
    """``x @ (weight * scale / 127)^T + bias``: int8 ``[out, in]``, float32 ``[out]``; only the weights are quantised.

    Few bfloat16 rows on a CPU go through torch's packed int8 product, whose scales are bfloat16 too, and few rows of a
    half type on a CUDA card through our kernel. Anything else is multiplied with the weights widened to the type of
    ``x``: as whole steps, which it holds exactly, or scaled where that is float16.
    """

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor, bias: Bias) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.steps = nn.Parameter(scales.float() / STEPS, requires_grad=False)
        self.packed_steps = nn.Parameter(self.steps.bfloat16(), requires_grad=False)
        self.bias = _parameter(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        few = len(rows) <= PACKED_ROWS
        if few and x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[-1] % PACKED_INPUTS == 0:
            found = torch._weight_int8pack_mm(rows, self.weight, self.packed_steps)
        elif few and x.device.type == "cuda" and x.dtype != torch.float32 and (product := _cuda_product()) is not None:
            found = product(rows, self.weight, self.steps)
        elif x.dtype == torch.float16:  # which cannot hold sums of whole steps
            found = functional.linear(rows, (self.weight * self.steps[:, None]).to(x.dtype))
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
    return layer  # type: ignore[no-any-return]


class Nf4Linear(nn.Module):
    """``x @ W^T + bias`` with W widened from a parameter of bitsandbytes for every product: slow, and exact."""

    def __init__(self, weight: Any, bias: Bias) -> None:
        super().__init__()
        self.weight, self.bias = weight, _parameter(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = bitsandbytes().functional.dequantize_4bit(self.weight.data, self.weight.quant_state)
        return functional.linear(x, wide.to(x.dtype), self.bias)


def nf4_linear(weight: Any, bias: Bias, dtype: torch.dtype) -> nn.Module:
    """A layer over a parameter of bitsandbytes: its own, but for float32, which it rounds to bfloat16 on some CPUs."""
    if dtype == torch.float32:
        return Nf4Linear(weight, bias)
    layer: Any = bitsandbytes().nn.Linear4bit(1, 1, False, dtype, quant_type="nf4", device="meta")
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
    return nf4_linear(weight, bias, dtype)


def quantised_linear(tensors: Tensors, quant: Quant, kernel: Int8Kernel, dtype: torch.dtype) -> nn.Module:
    """A layer from a weight ``[out, in]`` in full precision.

    Raises:
        InputError: values that are not finite.
    """
    weight = tensors["weight"]
    bias = tensors["bias"].to(dtype) if "bias" in tensors else None
    if not torch.isfinite(weight).all():
        raise InputError("a weight has NaN or infinite values; make the artifact again")
    if quant == "8bit":
        return _int8(kernel, weight.device)(*quantise_rows(weight.float()), bias)
    packed = bitsandbytes().nn.Params4bit(weight, quant_type="nf4", compress_statistics=False).to(weight.device)
    return nf4_linear(packed, bias, dtype)


def bnb_layers(model: nn.Module) -> set[str]:
    """Names of the classes of bitsandbytes in a model."""
    return {type(layer).__name__ for layer in model.modules() if type(layer).__module__.startswith("bitsandbytes.")}


@cache
def _cuda_product() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """The kernel for a few rows, where there is Triton to compile it."""
    if find_spec("triton") is None:
        return None
    from pos2d.runtime.backends.torch.triton_int8 import int8_product

    return int8_product


def _int8(kernel: Int8Kernel, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor, Bias], nn.Module]:
    """``auto``: weights alone, which is faster where it was measured and rounds less; bitsandbytes on a card without
    Triton, which its kernel is written in."""
    if kernel == "auto":
        kernel = "bnb" if device.type == "cuda" and _cuda_product() is None else "weight-only"
    return bnb_int8_linear if kernel == "bnb" else Int8Linear


def _parameter(tensor: Bias) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)
