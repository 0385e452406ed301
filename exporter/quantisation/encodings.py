"""How the exact values of one tensor become bytes: rounded, as int8 rows, as nf4 blocks, or as blocks for a graph.

An encoding says which tensors it writes before it sees a value, so that a file can be laid out, and then takes float64
rows in any order. What it returns is what a loader will compute with, in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from pos2d.exporter.files.tensor_io import BLOCK_ELEMENTS
from pos2d.exporter.inputs.checkpoint import DTYPES
from pos2d.exporter.quantisation.blockwise import dequantise, quantise
from pos2d.exporter.quantisation.gptq import Curvature, quantise_compensated
from pos2d.exporter.tensors.rounding import round_nearest
from pos2d.int8 import STEPS, quantise_rows
from pos2d.quiet import bitsandbytes
from pos2d.recipe import NF4_BLOCK

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
# Name of an output, its first byte, and the bytes.
Write = Callable[[str, int, memoryview], None]


class Encoding(Protocol):
    elements: ClassVar[int]  # values that it best gets at once

    def outputs(self, name: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        """Safetensors type and shape of every tensor that is written for tensor ``name``."""

    def encode(self, name: str, first: int, exact: "torch.Tensor", write: Write) -> "torch.Tensor":
        """Write float64 rows, the ``first`` of them by its number; returns the values that were stored for them."""

    def finish(self, name: str, shape: Shape, write: Write) -> None:
        """Write what belongs to the tensor as a whole."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """The nearest values of ``dtype`` (safetensors' name)."""

    elements: ClassVar[int] = BLOCK_ELEMENTS
    dtype: str

    def outputs(self, name: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        return {name: (self.dtype, shape)}

    def encode(self, name: str, first: int, exact: "torch.Tensor", write: Write) -> "torch.Tensor":
        import torch

        rounded = round_nearest(exact, getattr(torch, DTYPES[self.dtype][0]))
        write(name, first * exact[0].numel() * rounded.itemsize, _bytes(rounded))
        return rounded.double()

    def finish(self, name: str, shape: Shape, write: Write) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """bitsandbytes' own format: int8 ``[out, in]``, the largest magnitude of each row in float32 ``[out]``, and the
    number 0, its name for plain rows."""

    elements: ClassVar[int] = BLOCK_ELEMENTS

    def outputs(self, name: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        return {
            name: ("I8", shape),
            _beside(name, "SCB"): ("F32", shape[:1]),
            _beside(name, "weight_format"): ("U8", ()),
        }

    def encode(self, name: str, first: int, exact: "torch.Tensor", write: Write) -> "torch.Tensor":
        steps, scales = quantise_rows(exact)
        write(name, first * exact.shape[1], _bytes(steps))
        write(_beside(name, "SCB"), first * scales.itemsize, _bytes(scales))
        return steps.double() * (scales.double() / STEPS)[:, None]

    def finish(self, name: str, shape: Shape, write: Write) -> None:
        write(_beside(name, "weight_format"), 0, memoryview(b"\0"))


@dataclass(frozen=True, slots=True)
class Nf4Blocks:
    """bitsandbytes' own format: two values a byte, the largest magnitude of each block in float32, the 16 values of the
    code, and a note of type and shape. Rows are whole blocks; ``dtype`` is torch's name of the type to compute in."""

    elements: ClassVar[int] = BLOCK_ELEMENTS
    dtype: str

    def outputs(self, name: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        count = shape[0] * shape[1]
        found = {name: ("U8", (count // 2, 1)), f"{name}.absmax": ("F32", (count // NF4_BLOCK,))}
        for key, tensor in self._notes(shape).items():
            found[f"{name}.{key}"] = ("U8" if tensor.itemsize == 1 else "F32", tuple(tensor.shape))
        return found

    def encode(self, name: str, first: int, exact: "torch.Tensor", write: Write) -> "torch.Tensor":
        functional = bitsandbytes().functional
        packed, state = functional.quantize_4bit(exact.float(), blocksize=NF4_BLOCK, quant_type="nf4")
        before = first * exact.shape[1]
        write(name, before // 2, _bytes(packed))
        write(f"{name}.absmax", before // NF4_BLOCK * state.absmax.itemsize, _bytes(state.absmax))
        stored: torch.Tensor = functional.dequantize_4bit(packed, state)
        return stored.double()

    def finish(self, name: str, shape: Shape, write: Write) -> None:
        for key, tensor in self._notes(shape).items():
            write(f"{name}.{key}", 0, _bytes(tensor))

    def _notes(self, shape: Shape) -> "dict[str, torch.Tensor]":
        """What bitsandbytes stores beside values and scales."""
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
        notes: dict[str, torch.Tensor] = state.as_dict(packed=True)
        return {key: tensor for key, tensor in notes.items() if key != "absmax"}


@dataclass(frozen=True, slots=True)
class BlockBits:
    """ONNX Runtime's own format: ``bits`` a value, in blocks of ``block`` inputs of a row, each with a scale of type
    ``scales`` (safetensors' name)."""

    elements: ClassVar[int] = BLOCK_ELEMENTS
    bits: int
    block: int
    scales: str

    def outputs(self, name: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        blocks = -(-shape[1] // self.block)
        return {
            name: ("U8", (shape[0], blocks, self.block * self.bits // 8)),
            _beside(name, "scales"): (self.scales, (shape[0], blocks)),
        }

    def encode(self, name: str, first: int, exact: "torch.Tensor", write: Write) -> "torch.Tensor":
        import torch

        packed, wide = self._quantise(exact.float())
        scales = round_nearest(wide.double(), getattr(torch, DTYPES[self.scales][0]))
        write(name, first * packed[0].numel(), _bytes(packed))
        write(_beside(name, "scales"), first * scales[0].numel() * scales.itemsize, _bytes(scales))
        return dequantise(packed, scales.float(), self.bits, exact.shape[1]).double()

    def finish(self, name: str, shape: Shape, write: Write) -> None:
        pass

    def _quantise(self, values: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        return quantise(values, self.bits, self.block)


@dataclass(frozen=True, slots=True, eq=False)
class CompensatedBlockBits(BlockBits):
    """The same format, with errors where the layer's inputs hardly see them."""

    elements: ClassVar[int] = 1 << 21  # it goes column by column, so that few rows take as long as many
    curvature: Curvature

    def _quantise(self, values: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        return quantise_compensated(values, self.bits, self.block, self.curvature)


def _beside(name: str, what: str) -> str:
    return f"{name.removesuffix('weight')}{what}"


def _bytes(values: "torch.Tensor") -> memoryview:
    import torch

    data: memoryview = values.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data
