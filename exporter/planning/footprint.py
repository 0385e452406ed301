"""Disk and memory of a decoder in every format, in bytes, computed from its dimensions alone.

The terms are what the backends were measured to hold at their peak; ``benchmarks/footprint.py`` compares the sums with
measurements. Memory is resident memory as Linux counts it, which includes pages of mapped weight files.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import cast, get_args

from pos2d.bnb_format import NF4_BLOCK, STORED_PARTS, WEIGHT, BnbQuant
from pos2d.dtypes import ITEM_BYTES
from pos2d.exporter.planning import graph_footprint
from pos2d.exporter.quantisation.encodings import Int8Rows
from pos2d.families import Dimensions, expected_tensors
from pos2d.manifest import Kind
from pos2d.memory_costs import GRAPH_PREFILL_CHUNK, PROCESS_BYTES, TORCH_PREFILL_CHUNK, kv_cache_bytes
from pos2d.recipes import GraphQuant
from pos2d.sources.files.tensor_places import TensorPlace

# bitsandbytes (0.50), once its nf4 kernels are loaded; 8 bits run on torch's own.
BITSANDBYTES_BYTES = 47_000_000
# A tokenizer: the library, and what it holds for every entry of the vocabulary.
TOKENIZER_BYTES, TOKENIZER_ENTRY_BYTES = 30_000_000, 1300
# On CPUs with bfloat16 instructions nf4 weights are repacked layer by layer, by way of an int32 for every weight.
NF4_PACKING = 7
# CUDA's context and workspaces; not measured.
CUDA_BYTES = 600_000_000
# glibc retains up to twice the largest block that was freed, at most 64 MB; this is the middle.
ALLOCATOR_BYTES = 32_000_000

# On disk: an entry of a safetensors header.
HEADER_ENTRY_BYTES = 120
# An nf4 layer: the code of 16 float32 values, and the JSON of its shape and dtype (about; it grows with their digits).
NF4_CODE_BYTES, NF4_STATE_BYTES = 64, 90

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store and run a model; ``dtype`` is that of computation and of all weights that are not quantised."""

    kind: Kind
    dtype: str
    quant: BnbQuant | GraphQuant | None = None

    @property
    def name(self) -> str:
        return f"{self.kind} {self.quant or self.dtype}"

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def graph_quant(self) -> GraphQuant | None:
        """How a graph is quantised; None for other kinds."""
        return None if self.quant in get_args(BnbQuant) else cast(GraphQuant | None, self.quant)


@dataclass(frozen=True, slots=True)
class Workload:
    """What one generation computes: ``positions`` tokens in the cache at its end, ``pass_tokens`` tokens in its largest
    forward pass, and ``logits_rows`` of them that get logits."""

    positions: int
    pass_tokens: int
    logits_rows: int

    @classmethod
    def of(cls, branches: int, context: int) -> "Workload":
        """``branches`` that take ``context`` positions together, with prompts prefilled in the runtime's chunks."""
        return cls(context, max(branches, min(context, TORCH_PREFILL_CHUNK)), branches)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory by purpose: ``loading`` is the most that weights take while they are loaded, ``peak`` the most in all."""

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
    """Bytes of the weight files with their headers, or of the graphs and their data file."""
    if form.kind == "onnx":
        graphs = graph_footprint.graph_files_bytes(sizes, form.graph_quant)
        return graphs + graph_footprint.default_layout(sizes, form.dtype, form.graph_quant).nbytes
    linear, other = _linear_and_other(sizes)
    entries = len(other) + len(STORED_PARTS.get(cast(BnbQuant, form.quant), (WEIGHT,))) * len(linear)
    return weight_bytes(sizes, form) + entries * HEADER_ENTRY_BYTES


def weight_bytes(sizes: Dimensions, form: Format) -> int:
    """Bytes of the weights alone, as a checkpoint of this format stores them; a tied head is stored once."""
    if form.kind == "onnx":
        weights = graph_footprint.stored_weights(sizes, form.dtype, form.graph_quant)
        return sum(weight.values + weight.scales for weight in weights)
    linear, other = _linear_and_other(sizes)
    return _elements(other) * form.item_bytes + sum(_linear_bytes(shape, form) for shape in linear)


def activation_bytes(sizes: Dimensions, form: Format, work: Workload) -> int:
    """Memory of the largest forward pass apart from weights and cache: MLP, attention, mask and logits."""
    item, pairs = form.item_bytes, work.pass_tokens * work.positions
    if form.kind == "onnx":
        tokens = max(min(work.pass_tokens, GRAPH_PREFILL_CHUNK), work.logits_rows)
        return graph_footprint.activation_bytes(sizes, item, tokens, work.positions, work.logits_rows)
    mlp = work.pass_tokens * (4 * sizes.intermediate + 4 * sizes.hidden) * item
    # The kernel stores no scores. The mask exists twice as bools, once in the model's dtype, and once more for every
    # query head that shares keys.
    groups = sizes.heads // sizes.kv_heads
    attention = 2 * work.pass_tokens * sizes.heads * sizes.head_dim * item + pairs * (2 + item * (1 + groups))
    # The model's logits, and the float32 copy that the backend returns where that is another dtype.
    logits = work.logits_rows * sizes.vocab * (item + (4 if item != 4 else 0))
    dequantised = _largest_linear(sizes) * item if form.quant else 0  # the layer that is being multiplied
    return mlp + attention + logits + dequantised


def cpu_memory(
    sizes: Dimensions, form: Format, work: Workload, *, tokenizer: bool = True, extra_weight_bytes: int = 0
) -> Footprint:
    """Memory on the CPU, with or without a ``tokenizer``.

    ``extra_weight_bytes``: what a graph's weights take in addition to its format, because some layers are quantised in
    another way.
    """
    process = PROCESS_BYTES[form.kind] + (tokenizer_bytes(sizes) if tokenizer else 0)
    cache = kv_cache_bytes(sizes, work.positions, form.dtype)
    activations = activation_bytes(sizes, form, work)
    if form.kind == "onnx":
        weights = graph_footprint.weight_memory(sizes, form.dtype, form.graph_quant, work.positions)
        resident, loading = weights.resident + extra_weight_bytes, weights.loading + extra_weight_bytes
        return Footprint.of(process, resident, cache, activations, loading)
    if form.quant == "nf4":
        process += BITSANDBYTES_BYTES
        activations += NF4_PACKING * _largest_linear(sizes)
    return Footprint.of(process, weight_bytes(sizes, form), cache, activations + ALLOCATOR_BYTES)


def gpu_memory(sizes: Dimensions, form: Format, work: Workload) -> Footprint:
    """Memory on a GPU, for the formats that torch runs."""
    cache = kv_cache_bytes(sizes, work.positions, form.dtype)
    return Footprint.of(CUDA_BYTES, weight_bytes(sizes, form), cache, activation_bytes(sizes, form, work))


def tokenizer_bytes(sizes: Dimensions) -> int:
    return TOKENIZER_BYTES + sizes.vocab * TOKENIZER_ENTRY_BYTES


def _linear_and_other(sizes: Dimensions) -> tuple[list[Shape], list[Shape]]:
    """Shapes of the decoder's linear layers, ``(out, in)``, and of all other tensors."""
    shapes = expected_tensors(sizes)
    linear = [shape for name, shape in shapes.items() if name.endswith("_proj.weight")]
    return linear, [shape for name, shape in shapes.items() if not name.endswith("_proj.weight")]


def _elements(shapes: Iterable[Shape]) -> int:
    return sum(map(prod, shapes))


def _largest_linear(sizes: Dimensions) -> int:
    """Values of the largest linear layer."""
    return max(map(prod, _linear_and_other(sizes)[0]))


def _linear_bytes(shape: Shape, form: Format) -> int:
    """Bytes of one linear layer ``(out, in)``, with its scales and other parts."""
    elements = prod(shape)
    if form.quant == "8bit":
        outputs = Int8Rows().outputs(WEIGHT, shape).values()
        return sum(TensorPlace("", dims, dtype).nbytes for dtype, dims in outputs)
    if form.quant == "nf4":  # the encoding itself would have to load bitsandbytes
        return -(-elements // 2) + 4 * -(-elements // NF4_BLOCK) + NF4_CODE_BYTES + NF4_STATE_BYTES
    return elements * form.item_bytes
