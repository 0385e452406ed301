"""Sizes of ONNX artifacts: bytes of their files, and memory of ONNX Runtime (1.31) as measured on the CPU."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp

from pos2d.dtypes import ITEM_BYTES
from pos2d.exporter.formats.onnx.weight_layout import WeightLayout, lay_out
from pos2d.families import Dimensions, expected_tensors
from pos2d.recipes import BITS, DEFAULT_BLOCKS, GraphQuant, GraphRecipe
from pos2d.sources.checkpoints.checkpoint import EMBEDDING, HEAD, LM_HEAD

# The graph files without weights: bytes of all three together, and what each layer adds to them.
GRAPHS_BYTES, LAYER_BYTES, QUANTISED_LAYER_BYTES = 8000, 10_500, 14_000
# The attention kernels of two of the three graphs need heads of a multiple of this width.
HEAD_DIMS = 8
# On a page fault the kernel maps this much of the file, so every token that is looked up costs it.
FAULT_BYTES = 64 << 10
# Memory of ONNX Runtime and Python in a pass, apart from its tensors.
RUNTIME_BYTES = 12_000_000
FLOAT = 4  # bytes of a float32


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """One weight in the data file: bytes of its values and scales, and its number of quantised ``blocks`` (0: none).

    ``is_matmul``: a matrix product uses the weight, so ONNX Runtime packs it when it is loaded.
    """

    name: str
    values: int
    scales: int
    blocks: int
    is_matmul: bool


@dataclass(frozen=True, slots=True)
class WeightMemory:
    """``resident``: bytes that stay in memory after loading; ``loading``: the peak while weights are loaded."""

    resident: int
    loading: int


def default_layout(sizes: Dimensions, dtype: str, quant: GraphQuant | None) -> WeightLayout:
    """The data file of an export with default options; ``dtype`` is torch's name of the graph's dtype."""
    shapes = dict(sorted(expected_tensors(sizes).items()))
    if quant is None:
        return lay_out(shapes, sizes, dtype, None)
    # With "auto", 4 bits is the least that a layer gets. The head has 8 bits.
    bits = {name.removesuffix(".weight"): BITS[quant] for name in shapes if name.endswith("_proj.weight")}
    return lay_out(shapes, sizes, dtype, GraphRecipe(quant, DEFAULT_BLOCKS[quant], bits | {LM_HEAD: 8}))


def graph_files_bytes(sizes: Dimensions, quant: GraphQuant | None) -> int:
    """Bytes of the graph files without weights."""
    layer_bytes = LAYER_BYTES if quant is None else QUANTISED_LAYER_BYTES
    three_graphs = GRAPHS_BYTES + sizes.layers * layer_bytes
    return three_graphs if sizes.head_dim % HEAD_DIMS == 0 else three_graphs // 3


def stored_weights(sizes: Dimensions, dtype: str, quant: GraphQuant | None) -> Iterator[WeightBytes]:
    """Every weight of the data file, in file order."""
    for weight in default_layout(sizes, dtype, quant).weights.values():
        scales = [place for name, place in weight.places.items() if name != weight.name]
        yield WeightBytes(
            name=weight.name,
            values=weight.places[weight.name].nbytes,
            scales=sum(place.nbytes for place in scales),
            blocks=sum(place.elements for place in scales),
            is_matmul=weight.name.endswith("_proj.weight") or weight.name == (EMBEDDING if sizes.tied else HEAD),
        )


def weight_memory(sizes: Dimensions, dtype: str, quant: GraphQuant | None, positions: int) -> WeightMemory:
    """Memory of the weights once the embeddings of ``positions`` tokens were looked up."""
    weights = list(stored_weights(sizes, dtype, quant))
    matrices = [weight for weight in weights if weight.is_matmul]
    item = ITEM_BYTES[dtype]
    # Matrices are packed one after the other, and each one's mapped values are released then; its scales are not.
    packed = sum(_packed_bytes(matrix, item) for matrix in matrices)
    scales = sum(matrix.scales for matrix in matrices)
    loading = packed + scales + max(_unpacked_bytes(matrix, item) for matrix in matrices)
    retained = sum(_retained_bytes(matrix, item) for matrix in matrices)
    return WeightMemory(packed + retained + _embedding_bytes(weights, item, positions), loading)


def activation_bytes(sizes: Dimensions, item: int, tokens: int, positions: int, logits_rows: int) -> int:
    """Memory of a pass over ``tokens`` tokens apart from weights and cache; ``item`` is the bytes of a value.

    ONNX Runtime's buffers grow by powers of two.
    """
    mlp = 2 * tokens * (3 * sizes.intermediate + 2 * sizes.hidden) * item
    # One branch has no mask and its kernel stores no scores; with more, both are whole matrices, the mask as bools too.
    attention = 0 if logits_rows == 1 else tokens * positions * (sizes.heads * item + item + 1)
    # Logits are held three times: by the graph, by the engine and by the sampler.
    return RUNTIME_BYTES + mlp + attention + 3 * logits_rows * sizes.vocab * item


def _packed_bytes(matrix: WeightBytes, item: int) -> int:
    """Memory of a packed matrix.

    A quantised one has its values and, for every block, a float32 scale and sum, and the scale again if the file has it
    in half precision. Others are packed as float32, because half precision has no CPU kernel.
    """
    if matrix.blocks:
        return matrix.values + (2 if item == FLOAT else 3) * FLOAT * matrix.blocks
    return matrix.values * FLOAT // item


def _unpacked_bytes(matrix: WeightBytes, item: int) -> int:
    """What a matrix is packed from: the mapped values, or the float32 that half precision is widened to."""
    return matrix.values if matrix.blocks else matrix.values * FLOAT // item


def _retained_bytes(matrix: WeightBytes, item: int) -> int:
    """What stays in memory in addition to the packed matrix: the scales, or the halves that were widened."""
    if matrix.blocks:
        return matrix.scales
    return matrix.values if item < FLOAT else 0


def _embedding_bytes(weights: list[WeightBytes], item: int, positions: int) -> int:
    """Resident part of the embedding."""
    embedding = next(weight for weight in weights if weight.name == EMBEDDING)
    if embedding.is_matmul and not embedding.blocks and item == FLOAT:
        return embedding.values  # packing has read all of it, and it stays mapped
    nbytes = embedding.values + (0 if embedding.is_matmul else embedding.scales)
    # Tokens are spread over the whole table, and some lie in a part that is resident already.
    return round(nbytes * (1 - exp(-positions * FAULT_BYTES / nbytes)))
