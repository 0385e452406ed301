"""What ONNX graphs take: the bytes of their files, and what ONNX Runtime (1.31, on a CPU) was seen to hold of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, prod

from pos2d.families import Dimensions, expected_tensors
from pos2d.graph_recipe import BITS, DEFAULT_BLOCKS, GraphQuant

# As the export lays them out: the least inputs that share a scale in a table that is looked up, the beginnings of large
# and small tensors, and the layers that are one product.
MIN_BLOCK = 16
PAGE, LINE = 4096, 64
SIDE_BY_SIDE = {"q_proj": "q_k_v_proj", "k_proj": "q_k_v_proj", "v_proj": "q_k_v_proj"} | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# The three graphs' own files: of all, of every layer, and of every layer with quantised weights.
FILES_BYTES, LAYER_BYTES, QUANT_LAYER_BYTES = 8000, 10_500, 14_000
HEAD_DIMS = 8
# The kernel maps this much of a file around a page that is missing, so looking a token up costs it.
FAULT_BYTES = 64 << 10
# ONNX Runtime and Python beside the values of a pass.
WORK_BYTES = 12_000_000
# A float32 for a scale, in what quantised weights are packed into.
FLOAT = 4


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of the file of weights in bytes, and in ``blocks`` that have a scale; ``product``: one is made."""

    name: str
    values: int
    scales: int
    blocks: int
    product: bool


@dataclass(frozen=True, slots=True)
class Held:
    """``weights``: bytes that stay in the memory; ``loading``: those at the peak while they are read."""

    weights: int
    loading: int


def data_bytes(sizes: Dimensions, width: int, quant: GraphQuant | None) -> int:
    """Bytes of the one file of weights, gaps among them; ``width`` is that of the graph's type."""
    end = 0
    for tensor in stored(sizes, width, quant):
        for nbytes in filter(None, (tensor.values, tensor.scales)):
            step = PAGE if nbytes >= PAGE else LINE
            end = -(-end // step) * step + nbytes
    return end


def files_bytes(sizes: Dimensions, quant: GraphQuant | None) -> int:
    """Bytes of the graphs without their weights; heads of other widths have one of the three."""
    three = FILES_BYTES + sizes.layers * (LAYER_BYTES if quant is None else QUANT_LAYER_BYTES)
    return three if sizes.head_dim % HEAD_DIMS == 0 else three // 3


def stored(sizes: Dimensions, width: int, quant: GraphQuant | None) -> Iterator[Stored]:
    """Every tensor of the file of weights, in its order."""
    shapes: dict[str, tuple[int, ...]] = {}
    # What lies side by side comes first, the rest by name.
    singles = expected_tensors(sizes)
    parts = [name for name in singles if _is_part(name)]
    for single in (*parts, *sorted(singles.keys() - set(parts))):
        rows, *columns = singles[single]
        module = single.split(".")[-2]
        name = single.replace(module, SIDE_BY_SIDE.get(module, module))
        shapes[name] = (shapes.get(name, (0,))[0] + rows, *columns)
    for name, shape in shapes.items():
        product = name.endswith("_proj.weight") or name == (EMBEDDING if sizes.tied else HEAD)
        way = _blocks(name, sizes, quant)
        if way is None:
            yield Stored(name, prod(shape) * width, 0, 0, product)
        else:
            bits, block = way
            blocks = shape[0] * -(-shape[1] // block)
            yield Stored(name, blocks * block * bits // 8, blocks * width, blocks, product)


def held(sizes: Dimensions, width: int, quant: GraphQuant | None, positions: int) -> Held:
    """What the weights take after ``positions`` tokens were looked up."""
    tensors = list(stored(sizes, width, quant))
    products = [tensor for tensor in tensors if tensor.product]
    # Matrices are packed anew one after the other, and the mapped values of each are let go of then; its scales stay.
    packed = sum(_packed(tensor, width) for tensor in products)
    loading = packed + sum(tensor.scales for tensor in products) + max(_source(tensor, width) for tensor in products)
    kept = sum(_kept(tensor, width) for tensor in products)
    return Held(packed + kept + _looked_up(tensors, width, positions), loading)


def activation_bytes(sizes: Dimensions, width: int, rows: int, positions: int, logits_rows: int) -> int:
    """What a pass over ``rows`` tokens holds beside weights and cache; its buffers grow by powers of two."""
    mlp = 2 * rows * (3 * sizes.intermediate + 2 * sizes.hidden) * width
    # One branch has no mask, and its kernel keeps no scores; elsewhere both are whole matrices, the mask as bools too.
    attention = 0 if logits_rows == 1 else rows * positions * (sizes.heads * width + width + 1)
    # The graph's, those that the engine gathers, and the sampler's.
    return WORK_BYTES + mlp + attention + 3 * logits_rows * sizes.vocab * width


def _is_part(name: str) -> bool:
    return name.split(".")[-2] in SIDE_BY_SIDE


def _blocks(name: str, sizes: Dimensions, quant: GraphQuant | None) -> tuple[int, int] | None:
    """Bits, and inputs that share a scale; nothing for tensors that are not quantised."""
    if quant is None or not (name.endswith("_proj.weight") or name in (EMBEDDING, HEAD)):
        return None
    if name == EMBEDDING:
        block = min(DEFAULT_BLOCKS[quant], sizes.hidden & -sizes.hidden)
        return (8, block) if block >= MIN_BLOCK else None
    # "auto" spends at least 4 bits.
    return (8 if name == HEAD else BITS.get(quant, 4)), DEFAULT_BLOCKS[quant]


def _packed(tensor: Stored, width: int) -> int:
    """Quantised: values, and for every block its scale and sum, and the scale once more where the file has halves of
    it. Others: floats, as half precision has no kernel."""
    if tensor.blocks:
        return tensor.values + (2 if width == FLOAT else 3) * FLOAT * tensor.blocks
    return tensor.values * FLOAT // width


def _source(tensor: Stored, width: int) -> int:
    """What a matrix is packed from: the mapped values, or the floats that half precision was widened to first."""
    return tensor.values if tensor.blocks else tensor.values * FLOAT // width


def _kept(tensor: Stored, width: int) -> int:
    """What stays beside a packed matrix: the scales, or the halves that were widened."""
    if tensor.blocks:
        return tensor.scales
    return tensor.values if width < FLOAT else 0


def _looked_up(tensors: list[Stored], width: int, positions: int) -> int:
    """What is there of the table of tokens."""
    table = next(tensor for tensor in tensors if tensor.name == EMBEDDING)
    if table.product and not table.blocks and width == FLOAT:
        return table.values  # packing has read all of it, and it stays mapped
    nbytes = table.values + (0 if table.product else table.scales)
    # Tokens come from all over the table, some from where others were.
    return round(nbytes * (1 - exp(-positions * FAULT_BYTES / nbytes)))
