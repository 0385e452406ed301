"""The tensors of a GGUF file: in which type and where each is stored, and how they are written.

The package ``gguf`` writes the header with the names, types and places. The data follow from the exact sums, some rows
at a time, so that memory does not depend on the size of the model.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pos2d.dtypes import ITEM_BYTES
from pos2d.errors import InputError
from pos2d.exporter.formats.gguf.architecture import ROPE_FACTORS, Architecture, Ints, row_places
from pos2d.exporter.quantisation.encodings import Encoding, Rounded, Write
from pos2d.exporter.quantisation.gptq import HessianFactors
from pos2d.exporter.quantisation.writing import write_tensor
from pos2d.families import Dimensions
from pos2d.progress import Progress
from pos2d.recipes import GGUF_BLOCK, GgufRecipe
from pos2d.sources.checkpoints.checkpoint import EMBEDDING, HEAD, LM_HEAD
from pos2d.sources.files.parallel import single_threaded_torch, submitted, worker_count
from pos2d.sources.files.tensor_io import BLOCK_ELEMENTS, TensorFile, opened, write_at
from pos2d.sources.source import Source
from pos2d.sources.tensors.stats import DeltaStats
from pos2d.sources.tensors.tensor_plan import PlannedTensor, TensorPlan

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter

FloatKind = Literal["F32", "F16", "BF16"]
BlockKind = Literal["Q8_0", "Q4_0"]
# Bytes of a block of 32 values: a float16 scale and the values.
BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18}
# The default of the package: every tensor begins at a multiple of it, counted from the end of the header.
ALIGNMENT = 32


@dataclass(frozen=True, slots=True, eq=False)
class GgufTensor:
    """One tensor: its ``name`` and ``kind`` (llama.cpp's name of its type) in the file, and what it is computed from.

    ``offset`` is its first byte, counted from the end of the header. ``rearranged``: its rows lie as
    :func:`pos2d.exporter.formats.gguf.architecture.row_places` says.
    """

    name: str
    tensor: PlannedTensor
    kind: str
    offset: int
    rearranged: bool

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.kind, prod(self.tensor.shape[1:]))

    @property
    def nbytes(self) -> int:
        return self.tensor.shape[0] * self.row_bytes

    @property
    def encoding(self) -> Encoding:
        return GgmlBlocks(self.kind) if self.kind in BLOCK_BYTES else Rounded(self.kind)


@dataclass(frozen=True, slots=True)
class GgmlBlocks:
    """The block-wise types of llama.cpp, by the quantisers of the package ``gguf``; rows consist of whole blocks."""

    elements: ClassVar[int] = BLOCK_ELEMENTS
    kind: str

    def outputs(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: ("U8", (shape[0], row_bytes(self.kind, shape[1])))}

    def encode(self, name: str, first: int, exact: "torch.Tensor", write: Write) -> "torch.Tensor":
        import torch
        from gguf import GGMLQuantizationType, quants

        kind = GGMLQuantizationType[self.kind]
        data = quants.quantize(exact.float().numpy(), kind)
        write(name, first * data.shape[1], data.reshape(-1).data)
        return torch.from_numpy(quants.dequantize(data, kind)).double()

    def finish(self, name: str, shape: tuple[int, ...], write: Write) -> None:
        pass

    def calibrated_with(self, hessian: HessianFactors) -> Encoding:
        return self


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of one row of a tensor."""
    return columns // GGUF_BLOCK * BLOCK_BYTES[kind] if kind in BLOCK_BYTES else columns * ITEM_BYTES[kind]


def lay_out(
    merged: TensorPlan, sizes: Dimensions, architecture: Architecture, recipe: GgufRecipe | None, dtype: FloatKind
) -> tuple[GgufTensor, ...]:
    """Choose name, type and place of every tensor; ``dtype`` is the type of matrices that are not quantised.

    Vectors are float32, because llama.cpp adds and multiplies them in that type.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH[architecture.name.upper()], sizes.layers)
    offset = _padded(4 * sizes.num_frequencies) if architecture.factors is not None else 0
    found = []
    for tensor in merged.tensors:
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(f"llama.cpp's graph {architecture.name} has no tensor {tensor.name}")
        kind = "F32" if len(tensor.shape) == 1 else _kind(tensor, recipe, merged.tied) or dtype
        module = tensor.name.rpartition(".")[0]
        rearranged = architecture.neighbours and module.endswith(("q_proj", "k_proj"))
        found.append(GgufTensor(name, tensor, kind, offset, rearranged))
        offset += _padded(found[-1].nbytes)
    return tuple(found)


def _kind(tensor: PlannedTensor, recipe: GgufRecipe | None, tied: bool) -> BlockKind | None:
    """The quantised type of a matrix; None if it is not quantised."""
    if recipe is None or tensor.shape[1] % GGUF_BLOCK:
        return None
    is_head = tensor.name == (EMBEDDING if tied else HEAD)
    module = LM_HEAD if is_head else tensor.name.removesuffix(".weight")
    if module in recipe.skip_modules:
        return None
    return "Q8_0" if is_head or recipe.name == "q8_0" else "Q4_0"


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def data_bytes(tensors: Sequence[GgufTensor]) -> int:
    """Bytes of the file after its header."""
    return tensors[-1].offset + _padded(tensors[-1].nbytes)


def write_file(
    writer: "GGUFWriter", path: Path, tensors: Sequence[GgufTensor], architecture: Architecture, source: Source
) -> list[DeltaStats]:
    """Write the file at ``path``: what ``writer`` already has, then all tensors.

    Returns the sums over each quantised tensor, or where none is, over each that adapters change.

    Raises:
        InputError: values that are not finite, exactly or as stored, or a base that changed while it was read.
    """
    import numpy as np
    from gguf import GGMLQuantizationType

    factors = architecture.factors
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, np.dtype(np.float32), factors.nbytes)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.tensor.shape, np.dtype(np.float16), tensor.nbytes, GGMLQuantizationType[tensor.kind]
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = _padded(path.stat().st_size)
    with Progress("writing weights", data_bytes(tensors), unit="bytes") as progress:
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.truncate(descriptor, start + data_bytes(tensors))
            if factors is not None:
                write_at(descriptor, factors.view(np.uint8).data, start)
            return _write_tensors(tensors, source, descriptor, start, progress)
        finally:
            os.close(descriptor)


def _write_tensors(
    tensors: Sequence[GgufTensor], source: Source, descriptor: int, start: int, progress: Progress
) -> list[DeltaStats]:
    quantised = any(tensor.kind in BLOCK_BYTES for tensor in tensors)
    head_dim = source.base.sizes.head_dim
    # The largest first, so that all threads end at about the same time.
    order = sorted(tensors, key=lambda tensor: -tensor.nbytes)
    with (
        opened(source.base.directory, {tensor.tensor.source.file for tensor in tensors}) as files,
        ThreadPoolExecutor(worker_count()) as workers,
        single_threaded_torch(),
    ):
        jobs = (
            (tensor, files[tensor.tensor.source.file], descriptor, start, head_dim, quantised, progress)
            for tensor in order
        )
        with submitted(workers, _write_tensor, jobs) as tallies:
            return [tally for tally in tallies if tally is not None]


def _write_tensor(
    tensor: GgufTensor,
    file: TensorFile,
    descriptor: int,
    start: int,
    head_dim: int,
    quantised: bool,
    progress: Progress,
) -> DeltaStats | None:
    places = row_places(tensor.tensor.shape[0], head_dim) if tensor.rearranged else None

    def write(_: str, offset: int, data: memoryview) -> None:
        for place, part in _placed(data, offset, tensor.row_bytes, places):
            write_at(descriptor, part, start + tensor.offset + place)
        progress.advance(len(data))

    measure = tensor.kind in BLOCK_BYTES if quantised else bool(tensor.tensor.deltas)
    return write_tensor(tensor.tensor, file, tensor.encoding, write, measure=measure)


def _placed(data: memoryview, offset: int, width: int, places: "Ints | None") -> Iterator[tuple[int, memoryview]]:
    """The offset and the bytes of every piece of whole rows of ``width`` bytes that lie behind one another."""
    if places is None:
        yield offset, data
        return
    first = offset // width
    for number in range(len(data) // width):
        yield int(places[first + number]) * width, data[number * width : (number + 1) * width]
