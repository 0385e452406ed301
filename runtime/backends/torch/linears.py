"""Linear layers over weights in the formats of bitsandbytes, with torch's kernels or those of bitsandbytes."""

from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pos2d.bnb_format import INT8_STEPS, OUTLIER_THRESHOLD, BnbQuant, quantise_rows
from pos2d.errors import InputError
from pos2d.runtime.backends.options import Int8Kernel
from pos2d.runtime.backends.torch.bitsandbytes_library import bitsandbytes

# torch's packed int8 product works row by row; for more rows than this, converting the weights first is faster
# (measured on two x86-64 cores with AVX-512: the two are equally fast at 16 to 24 rows).
PACKED_MAX_ROWS = 16
# Its rows must be multiples of the vector width: otherwise it reads past their ends, and gives wrong results or fails
# (torch 2.13).
PACKED_INPUT_MULTIPLE = 16

Tensors = Mapping[str, torch.Tensor]
Bias = torch.Tensor | None


class Int8Linear(nn.Module):
    """``x @ (weight * scale / 127)^T + bias`` with int8 ``[out, in]`` and float32 ``[out]``; activations are not
    quantised.

    A few bfloat16 rows on a CPU go through torch's packed int8 product, whose scales are bfloat16 as well; a few rows
    of a 16-bit type on a CUDA GPU go through our Triton kernel. In all other cases the weights are first converted to
    the type of ``x``: as integers, which it represents exactly, or already scaled for float16.
    """

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor, bias: Bias) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.steps = nn.Parameter(scales.float() / INT8_STEPS, requires_grad=False)
        self.packed_steps = nn.Parameter(self.steps.bfloat16(), requires_grad=False)
        self.bias = _parameter(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        few = len(rows) <= PACKED_MAX_ROWS
        if few and x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[-1] % PACKED_INPUT_MULTIPLE == 0:
            outputs = torch._weight_int8pack_mm(rows, self.weight, self.packed_steps)
        elif (
            few and x.device.type == "cuda" and x.dtype != torch.float32 and (product := _triton_product()) is not None
        ):
            outputs = product(rows, self.weight, self.steps)
        elif x.dtype == torch.float16:  # sums of unscaled integers would overflow
            outputs = functional.linear(rows, (self.weight * self.steps[:, None]).to(x.dtype))
        else:
            outputs = functional.linear(rows, self.weight.to(x.dtype)) * self.steps.to(x.dtype)
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.reshape(*x.shape[:-1], -1)


def bnb_int8_linear(weight: torch.Tensor, scales: torch.Tensor, bias: Bias) -> nn.Module:
    """A layer of bitsandbytes over int8 ``[out, in]`` and float32 ``[out]``; it quantises the activations as well."""
    layers = bitsandbytes().nn
    layer: Any = layers.Linear8bitLt(
        weight.shape[1], weight.shape[0], False, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD, device="meta"
    )
    layer.weight = layers.Int8Params(weight, requires_grad=False, CB=weight, SCB=scales)
    layer.bias = _parameter(bias)
    return layer  # type: ignore[no-any-return]


class Nf4Linear(nn.Module):
    """``x @ W^T + bias`` in float32; W is dequantised from a parameter of bitsandbytes for every product, which is slow
    and exact: a code value times the scale of its block, rounded once."""

    def __init__(self, weight: Any, bias: Bias) -> None:
        super().__init__()
        self.weight, self.bias = weight, _parameter(bias)
        # The state has the type of the weights that were quantised, which bitsandbytes would round to: bfloat16 moves
        # every weight by up to 0.4 %.
        weight.quant_state.dtype = torch.float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = bitsandbytes().functional.dequantize_4bit(self.weight.data, self.weight.quant_state)
        return functional.linear(x, weight.to(x.dtype), self.bias)


def nf4_linear(weight: Any, bias: Bias, dtype: torch.dtype) -> nn.Module:
    """A layer over an nf4 parameter of bitsandbytes.

    It is bitsandbytes' layer for 16-bit types and ours for float32, which theirs rounds to bfloat16 on CPUs that have
    instructions for it, scales included (0.50; outputs are then off by 0.3 %).
    """
    if dtype == torch.float32:
        return Nf4Linear(weight, bias)
    layer: Any = bitsandbytes().nn.Linear4bit(1, 1, False, dtype, quant_type="nf4", device="meta")
    layer.weight, layer.bias = weight, _parameter(bias)
    return layer  # type: ignore[no-any-return]


def stored_linear(tensors: Tensors, quant: BnbQuant, kernel: Int8Kernel, dtype: torch.dtype) -> nn.Module:
    """A layer from stored quantised tensors; the keys of ``tensors`` are their names without the module's name."""
    bias = tensors["bias"].to(dtype) if "bias" in tensors else None
    if quant == "8bit":
        return _int8(kernel, tensors["weight"].device)(tensors["weight"], tensors["SCB"], bias)
    stats = {name: tensor for name, tensor in tensors.items() if name.startswith("weight.")}
    weight = bitsandbytes().nn.Params4bit.from_prequantized(
        data=tensors["weight"], quantized_stats=stats, device=tensors["weight"].device
    )
    return nf4_linear(weight, bias, dtype)


def quantised_linear(tensors: Tensors, quant: BnbQuant, kernel: Int8Kernel, dtype: torch.dtype) -> nn.Module:
    """Quantise a weight ``[out, in]``, and its bias if there is one, into a layer.

    Raises:
        InputError: the weight has values that are not finite.
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
    """The class names of those layers of a model that are bitsandbytes' classes."""
    return {type(layer).__name__ for layer in model.modules() if type(layer).__module__.startswith("bitsandbytes.")}


@cache
def _triton_product() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """The kernel for a few rows on a CUDA GPU; None if Triton, which compiles it, is not installed."""
    if find_spec("triton") is None:
        return None
    from pos2d.runtime.backends.torch.triton_int8 import int8_product

    return int8_product


def _int8(kernel: Int8Kernel, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor, Bias], nn.Module]:
    """The function that makes an 8-bit layer.

    ``auto`` is ``weight-only``, which rounds less and was faster wherever it was measured; on a CUDA GPU without Triton
    it is ``bnb``.
    """
    if kernel == "auto":
        kernel = "bnb" if device.type == "cuda" and _triton_product() is None else "weight-only"
    return bnb_int8_linear if kernel == "bnb" else Int8Linear


def _parameter(tensor: Bias) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)
