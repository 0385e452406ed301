"""What a decoder takes of disk, memory and a graphics card. Pure arithmetic over its sizes; everything is in bytes.

The terms are what the backends were seen to hold at their peak, and ``benchmarks/footprint.py`` compares the sums with
measurements. Memory is what Linux counts as resident, pages of mapped weight files among it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import cast, get_args

from pos2d import graph_footprint
from pos2d.errors import StorageError
from pos2d.families import Dimensions, expected_tensors
from pos2d.graph_recipe import GraphQuant
from pos2d.manifest import Kind
from pos2d.recipe import NF4_BLOCK, Quant
from pos2d.units import size_text

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

# How the runtime reads: prompts in pieces of this many tokens, and logits for the newest token of every branch.
PREFILL_ROWS = 512
GRAPH_ROWS = 128

# A process after its imports and with an empty model, measured on Linux (CPU builds: torch 2.13, transformers 5.23,
# bitsandbytes 0.50, onnxruntime-gpu 1.31). Of torch's 230 MB are torch itself; 8 bits run on its own kernels.
PROCESS_BYTES: dict[Kind, int] = {"merged": 370_000_000, "bnb": 370_000_000, "onnx": 79_000_000}
BITSANDBYTES_BYTES = 47_000_000
# A tokenizer: the library, and what it holds for every entry of the vocabulary.
TOKENIZER_BYTES, TOKENIZER_ENTRY_BYTES = 30_000_000, 1300
# CPUs with bfloat16 instructions get nf4 weights packed anew, a layer at a time, by way of an int32 for every weight.
NF4_PACKING = 7
# CUDA's context and workspaces; not measured here.
CARD_BYTES = 600_000_000
# glibc keeps up to twice the largest block that it gave back, at most 64 MB; this is the middle.
ALLOCATOR_BYTES = 32_000_000

# On disk: an entry of a safetensors header.
HEADER_ENTRY_BYTES = 120
# bitsandbytes nf4: the table of 16 values, and a JSON of the state.
NF4_TABLE_BYTES, NF4_STATE_BYTES = 64, 90


@dataclass(frozen=True, slots=True)
class Format:
    """One way of storing and running a model; ``dtype`` is that of the arithmetic and of what is not quantised."""

    kind: Kind
    dtype: str
    quant: Quant | GraphQuant | None = None

    @property
    def name(self) -> str:
        return f"{self.kind} {self.quant or self.dtype}"

    @property
    def width(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def graph_quant(self) -> GraphQuant | None:
        """How a graph is quantised; nothing for other kinds."""
        return None if self.quant in get_args(Quant) else cast(GraphQuant | None, self.quant)


@dataclass(frozen=True, slots=True)
class Workload:
    """``positions`` tokens in the cache at the end; ``rows`` tokens in one pass and ``logits_rows`` that get logits, at
    most."""

    positions: int
    rows: int
    logits_rows: int

    @classmethod
    def of(cls, branches: int, context: int) -> "Workload":
        """What the runtime does with ``branches`` that take ``context`` positions together."""
        return cls(context, max(branches, min(context, PREFILL_ROWS)), branches)


@dataclass(frozen=True, slots=True)
class Footprint:
    """``loading`` is held only while the weights are read; ``peak`` is the most at any time, the process with it."""

    process: int
    weights: int
    cache: int
    activations: int
    loading: int
    peak: int

    @classmethod
    def of(cls, process: int, weights: int, cache: int, activations: int, loading: int = 0) -> "Footprint":
        return cls(process, weights, cache, activations, loading, process + max(loading, weights + cache + activations))


def disk_bytes(sizes: Dimensions, form: Format) -> int:
    """Bytes of the weight files, headers among them; a tied head is stored once."""
    if form.kind == "onnx":
        graphs = graph_footprint.files_bytes(sizes, form.graph_quant)
        return graphs + graph_footprint.data_bytes(sizes, form.width, form.graph_quant)
    linear, rest = _split(expected_tensors(sizes))
    parts = {"8bit": 3, "nf4": 4}.get(form.quant or "", 1)
    entries = len(rest) + parts * len(linear)
    return weight_bytes(sizes, form) + entries * HEADER_ENTRY_BYTES


def weight_bytes(sizes: Dimensions, form: Format) -> int:
    """Bytes of the weights themselves, as a checkpoint of this format holds them."""
    if form.kind == "onnx":
        tensors = graph_footprint.stored(sizes, form.width, form.graph_quant)
        return sum(tensor.values + tensor.scales for tensor in tensors)
    linear, rest = _split(expected_tensors(sizes))
    return sum(_stored(rest, form)) + sum(_quantised(shape, form) for shape in linear)


def cache_bytes(sizes: Dimensions, positions: int, dtype: str) -> int:
    """Keys and values of ``positions`` tokens; branches are parts of one sequence, so they share them."""
    return 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * positions * DTYPE_BYTES[dtype]


def activation_bytes(sizes: Dimensions, form: Format, work: Workload) -> int:
    """What the widest pass holds beside weights and cache: MLP, attention, mask and logits."""
    width, pairs = form.width, work.rows * work.positions
    if form.kind == "onnx":
        rows = max(min(work.rows, GRAPH_ROWS), work.logits_rows)
        return graph_footprint.activation_bytes(sizes, width, rows, work.positions, work.logits_rows)
    mlp = work.rows * (4 * sizes.intermediate + 4 * sizes.hidden) * width
    # The kernel keeps no scores. The mask is there as bools twice, once in the model's type, and once more for every
    # query head that shares keys.
    groups = sizes.heads // sizes.kv_heads
    attention = 2 * work.rows * sizes.heads * sizes.head_dim * width + pairs * (2 + width * (1 + groups))
    # The model's logits, and the float32 that leaves it where that is another type.
    logits = work.logits_rows * sizes.vocab * (width + (4 if width != 4 else 0))
    linear, _ = _split(expected_tensors(sizes))
    widened = max(map(prod, linear)) * width if form.quant else 0  # the layer that is being multiplied
    return mlp + attention + logits + widened


def memory(sizes: Dimensions, form: Format, work: Workload, *, text: bool = True, more: int = 0) -> Footprint:
    """The footprint on the CPU; ``text`` counts a tokenizer. ``more``: bytes of a graph's weights beyond those of its
    format, because some layers are quantised otherwise."""
    process = PROCESS_BYTES[form.kind] + (tokenizer_bytes(sizes) if text else 0)
    weights, cache = weight_bytes(sizes, form), cache_bytes(sizes, work.positions, form.dtype)
    activations = activation_bytes(sizes, form, work)
    if form.kind == "onnx":
        held = graph_footprint.held(sizes, form.width, form.graph_quant, work.positions)
        return Footprint.of(process, held.weights + more, cache, activations, held.loading + more)
    if form.quant == "nf4":
        linear, _ = _split(expected_tensors(sizes))
        process += BITSANDBYTES_BYTES
        activations += NF4_PACKING * max(map(prod, linear))
    return Footprint.of(process, weights, cache, activations + ALLOCATOR_BYTES)


def card_memory(sizes: Dimensions, form: Format, work: Workload) -> Footprint:
    """The footprint on a graphics card, of the formats that torch runs."""
    cache = cache_bytes(sizes, work.positions, form.dtype)
    return Footprint.of(CARD_BYTES, weight_bytes(sizes, form), cache, activation_bytes(sizes, form, work))


def least_memory(kind: Kind, stored_bytes: int, stored: str, dtype: str, quant: Quant | None = None) -> int:
    """What an artifact takes on the CPU before its first token: the process, and its weights.

    For a loader, which knows the bytes of the files and their type but not the sizes. A merged one is converted where
    ``dtype`` is not the ``stored`` type, or quantised on its way; the weights of the others stay as they are.
    """
    if kind != "merged":
        return PROCESS_BYTES[kind] + stored_bytes
    half_bytes = {None: 2 * DTYPE_BYTES[dtype], "8bit": 2, "nf4": 1}[quant]
    return PROCESS_BYTES[kind] + stored_bytes * half_bytes // (2 * DTYPE_BYTES[stored])


def tokenizer_bytes(sizes: Dimensions) -> int:
    return TOKENIZER_BYTES + sizes.vocab * TOKENIZER_ENTRY_BYTES


def check_memory_fits(what: str, needed: int, available: int) -> None:
    """Raises:
    StorageError: ``what`` needs more bytes of memory than are available.
    """
    if needed > available:
        raise StorageError(
            f"{what} needs {size_text(needed)} of memory, {size_text(available)} are available; close other programs "
            "or take a smaller format, which `pos2d plan` finds"
        )


def _split(shapes: dict[str, tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The shapes of the linear layers of the decoder, and all others."""
    linear = [shape for name, shape in shapes.items() if name.endswith("_proj.weight")]
    return linear, [shape for name, shape in shapes.items() if not name.endswith("_proj.weight")]


def _stored(shapes: Iterable[tuple[int, ...]], form: Format) -> Iterable[int]:
    return (prod(shape) * form.width for shape in shapes)


def _quantised(shape: tuple[int, ...], form: Format) -> int:
    """Bytes of one linear layer ``(out, in)``, with what belongs to it."""
    elements = prod(shape)
    if form.quant == "8bit":
        return elements + 4 * shape[0] + 1  # a scale a row, and one byte that names the layout
    if form.quant == "nf4":
        return -(-elements // 2) + 4 * -(-elements // NF4_BLOCK) + NF4_TABLE_BYTES + NF4_STATE_BYTES
    return elements * form.width
