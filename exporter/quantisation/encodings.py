"""How the exact values of a tensor are stored: rounded, or quantised in a format of bitsandbytes or ONNX Runtime.

An encoding declares the tensors that it writes before it has seen a value, so that a file can be laid out first. Then
it takes float64 rows in any order, and returns the values that a loader will compute with, in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from pos2d.bnb_format import (
    INT8_STEPS,
    LAYOUT,
    NF4_ABSMAX,
    NF4_BLOCK,
    NF4_CODE,
    NF4_STATE,
    SCALES,
    WEIGHT,
    quantise_rows,
)
from pos2d.exporter.quantisation.bitsandbytes_library import bitsandbytes
from pos2d.exporter.quantisation.blockwise import dequantise, quantise
from pos2d.exporter.quantisation.gptq import HessianFactors, quantise_with_gptq
from pos2d.sources.files.tensor_io import BLOCK_ELEMENTS
from pos2d.sources.files.tensor_places import torch_dtype
from pos2d.sources.tensors.rounding import round_nearest

if TYPE_CHECKING:
    import torch

# The memory layout of int8 weights whose rows follow each other.
PLAIN_ROWS = b"\0"
# Name of the scales of a weight in blocks, after the layer's name.
BLOCK_SCALES = "scales"

Shape = tuple[int, ...]
# Writes bytes into an output tensor: its name, the offset in its data, and the bytes.
Write = Callable[[str, int, memoryview], None]


class Encoding(Protocol):
    """A way to store a tensor; ``elements`` is the number of values that :meth:`encode` best gets at a time."""

    elements: ClassVar[int]

    def outputs(self, name: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        """The safetensors dtype and shape of every tensor that is written for the tensor ``name``."""

    def encode(self, name: str, first: int, exact: "torch.Tensor", write: Write) -> "torch.Tensor":
        """Write float64 rows, from row number ``first`` on; returns the stored values in float64."""

    def finish(self, name: str, shape: Shape, write: Write) -> None:
        """Write the outputs that do not depend on single rows."""

    def calibrated_with(self, hessian: HessianFactors) -> "Encoding":
        """The encoding of the same format that uses the Hessian of the layer's inputs, or this one if there is none."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """Values rounded to the nearest of ``dtype`` (safetensors' name)."""

    elements: ClassVar[int] = BLOCK_ELEMENTS
    dtype: str

    def outputs(self, name: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        return {name: (self.dtype, shape)}

    def encode(self, name: str, first: int, exact: "torch.Tensor", write: Write) -> "torch.Tensor":
        rounded = round_nearest(exact, torch_dtype(self.dtype))
        write(name, first * exact[0].numel() * rounded.itemsize, _bytes(rounded))
        return rounded.double()

    def finish(self, name: str, shape: Shape, write: Write) -> None:
        pass

    def calibrated_with(self, hessian: HessianFactors) -> Encoding:
        return self


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """The 8-bit format of bitsandbytes (LLM.int8()): int8 ``[out, in]``, and the largest magnitude of each row, float32
    ``[out]``."""

    elements: ClassVar[int] = BLOCK_ELEMENTS

    def outputs(self, name: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        return {
            name: ("I8", shape),
            _sibling(name, SCALES): ("F32", shape[:1]),
            _sibling(name, LAYOUT): ("U8", ()),
        }

    def encode(self, name: str, first: int, exact: "torch.Tensor", write: Write) -> "torch.Tensor":
        q, scales = quantise_rows(exact)
        write(name, first * exact.shape[1], _bytes(q))
        write(_sibling(name, SCALES), first * scales.itemsize, _bytes(scales))
        stored: torch.Tensor = q.double() * (scales.double() / INT8_STEPS)[:, None]
        return stored

    def finish(self, name: str, shape: Shape, write: Write) -> None:
        write(_sibling(name, LAYOUT), 0, memoryview(PLAIN_ROWS))

    def calibrated_with(self, hessian: HessianFactors) -> Encoding:
        return self


@dataclass(frozen=True, slots=True)
class Nf4Blocks:
    """The nf4 format of bitsandbytes (QLoRA): two values a byte, the largest magnitude of each block in float32, the 16
    values of the code, and dtype and shape as JSON.

    Rows consist of whole blocks; ``dtype`` is torch's name of the dtype that loaders compute in.
    """

    elements: ClassVar[int] = BLOCK_ELEMENTS
    dtype: str

    def outputs(self, name: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        count = shape[0] * shape[1]
        outputs = {name: ("U8", (count // 2, 1)), _sibling(name, NF4_ABSMAX): ("F32", (count // NF4_BLOCK,))}
        for part, tensor in self._constants(shape).items():
            outputs[_sibling(name, part)] = ("U8" if tensor.itemsize == 1 else "F32", tuple(tensor.shape))
        return outputs

    def encode(self, name: str, first: int, exact: "torch.Tensor", write: Write) -> "torch.Tensor":
        functional = bitsandbytes().functional
        packed, state = functional.quantize_4bit(exact.float(), blocksize=NF4_BLOCK, quant_type="nf4")
        elements_before = first * exact.shape[1]
        write(name, elements_before // 2, _bytes(packed))
        absmax_offset = elements_before // NF4_BLOCK * state.absmax.itemsize
        write(_sibling(name, NF4_ABSMAX), absmax_offset, _bytes(state.absmax))
        stored: torch.Tensor = functional.dequantize_4bit(packed, state)
        return stored.double()

    def finish(self, name: str, shape: Shape, write: Write) -> None:
        for part, tensor in self._constants(shape).items():
            write(_sibling(name, part), 0, _bytes(tensor))

    def calibrated_with(self, hessian: HessianFactors) -> Encoding:
        return self

    def _constants(self, shape: Shape) -> "dict[str, torch.Tensor]":
        """The stored tensors that do not depend on the weights: the code, and dtype and shape."""
        import torch

        functional = bitsandbytes().functional
        state = functional.QuantState(
            absmax=torch.empty(0),
            shape=torch.Size(shape),
            code=functional.get_4bit_type("nf4", device="cpu", blocksize=NF4_BLOCK),
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=getattr(torch, self.dtype),
        )
        parts = {f"{WEIGHT}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
        return {part: parts[part] for part in (NF4_CODE, NF4_STATE)}


@dataclass(frozen=True, slots=True)
class BlockBits:
    """The block-wise format of ONNX Runtime: ``bits`` a value, and for each block of ``block_size`` inputs of a row a
    scale of the dtype ``scale_dtype`` (safetensors' name)."""

    elements: ClassVar[int] = BLOCK_ELEMENTS
    bits: int
    block_size: int
    scale_dtype: str

    def outputs(self, name: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        blocks = -(-shape[1] // self.block_size)
        return {
            name: ("U8", (shape[0], blocks, self.block_size * self.bits // 8)),
            _sibling(name, BLOCK_SCALES): (self.scale_dtype, (shape[0], blocks)),
        }

    def encode(self, name: str, first: int, exact: "torch.Tensor", write: Write) -> "torch.Tensor":
        packed, float32_scales = self._quantise(exact.float())
        scales = round_nearest(float32_scales.double(), torch_dtype(self.scale_dtype))
        write(name, first * packed[0].numel(), _bytes(packed))
        write(_sibling(name, BLOCK_SCALES), first * scales[0].numel() * scales.itemsize, _bytes(scales))
        return dequantise(packed, scales.float(), self.bits, exact.shape[1]).double()

    def finish(self, name: str, shape: Shape, write: Write) -> None:
        pass

    def calibrated_with(self, hessian: HessianFactors) -> Encoding:
        return GptqBlockBits(self.bits, self.block_size, self.scale_dtype, hessian)

    def _quantise(self, values: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        return quantise(values, self.bits, self.block_size)


@dataclass(frozen=True, slots=True, eq=False)
class GptqBlockBits(BlockBits):
    """The same format, quantised with GPTQ for the Hessian of the layer's inputs."""

    elements: ClassVar[int] = 1 << 21  # GPTQ goes column by column, so that few rows take as long as many
    hessian: HessianFactors

    def _quantise(self, values: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        return quantise_with_gptq(values, self.bits, self.block_size, self.hessian)


def _sibling(name: str, part: str) -> str:
    """The name of another tensor of the layer that the weight ``name`` belongs to."""
    return f"{name.removesuffix(WEIGHT)}{part}"


def _bytes(values: "torch.Tensor") -> memoryview:
    import torch

    data: memoryview = values.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data
