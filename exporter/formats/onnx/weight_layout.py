"""The weight file that all graphs of an artifact share: what is stored at which offset.

The layout follows from shapes and the recipe alone, so it needs no weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from pos2d.dtypes import SAFETENSORS_NAMES
from pos2d.exporter.quantisation.encodings import BlockBits, Encoding, Rounded
from pos2d.families import Dimensions
from pos2d.onnx_io import DATA_FILE, FUSED_LAYERS, fused_name
from pos2d.recipes import GraphRecipe
from pos2d.sources.checkpoints.checkpoint import EMBEDDING, HEAD, LM_HEAD
from pos2d.sources.files.tensor_places import TensorPlace

# Large tensors begin at a page, so that they can be mapped; small ones at a cache line.
PAGE, LINE = 4096, 64
# GatherBlockQuantized supports no smaller blocks, and no row whose last block is padded.
MIN_BLOCK = 16

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class GraphWeight:
    """One weight of the graphs: the tensors ``parts`` of the model, concatenated along their rows.

    ``shape`` is that of the whole. ``encoding`` writes it as one stored tensor or several (packed values, scales), and
    ``places`` says by name where each of them lies.
    """

    name: str
    shape: Shape
    parts: tuple[str, ...]
    encoding: Encoding
    places: Mapping[str, TensorPlace]


@dataclass(frozen=True, slots=True, eq=False)
class WeightLayout:
    """Every weight by name, in the order of the file.

    ``dtype`` is torch's name of the type of activations, cache and weights that are not quantised; ``tied`` is whether
    the embedding is also the head; ``nbytes`` is the size of the file.
    """

    weights: Mapping[str, GraphWeight]
    dtype: str
    tied: bool
    nbytes: int


def lay_out(shapes: Mapping[str, Shape], sizes: Dimensions, dtype: str, recipe: GraphRecipe | None) -> WeightLayout:
    """Lay out the tensors of a model, given by name and shape; a tied head is not among them.

    Fused layers come first, then all other tensors in the order of ``shapes``.
    """
    encodings = {name: _encoding(name, shape, dtype, recipe) for name, shape in shapes.items()}
    weights: dict[str, GraphWeight] = {}
    end = 0
    for name, parts in _parts_of_weights(shapes, encodings, sizes, recipe).items():
        encoding = encodings[parts[0]]
        shape = (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:])
        places = {}
        for stored, (kind, stored_shape) in encoding.outputs(name, shape).items():
            nbytes = TensorPlace(DATA_FILE, stored_shape, kind).nbytes
            alignment = PAGE if nbytes >= PAGE else LINE
            places[stored] = TensorPlace(DATA_FILE, stored_shape, kind, -(-end // alignment) * alignment)
            end = places[stored].offset + nbytes
        weights[name] = GraphWeight(name, shape, parts, encoding, places)
    return WeightLayout(weights, dtype, HEAD not in shapes, end)


def embedding_block(hidden: int) -> int:
    """The largest power of two that divides ``hidden``: blocks of at most this size fill every row of the embedding."""
    return hidden & -hidden


def fusible_modules(block: str) -> list[str]:
    """The linear layers of ``block`` (``model.layers.0.mlp``) that read the same input, and may be one product."""
    return [f"{block}.{module}" for module in FUSED_LAYERS[block.rpartition(".")[2]]]


def _encoding(name: str, shape: Shape, dtype: str, recipe: GraphRecipe | None) -> Encoding:
    unquantised = Rounded(SAFETENSORS_NAMES[dtype])
    # A tied embedding is also the head's weight, and an untied one is quantised as the head is.
    module = LM_HEAD if name in (EMBEDDING, HEAD) else name.removesuffix(".weight")
    bits = recipe.bits.get(module) if recipe is not None else None
    if recipe is None or bits is None:
        return unquantised
    block = recipe.block_size
    if name == EMBEDDING:
        block = min(block, embedding_block(shape[1]))
        if block < MIN_BLOCK:
            return unquantised
    return BlockBits(bits, block, unquantised.dtype)


def _parts_of_weights(
    shapes: Mapping[str, Shape], encodings: Mapping[str, Encoding], sizes: Dimensions, recipe: GraphRecipe | None
) -> dict[str, tuple[str, ...]]:
    """The name of every weight of the graphs, and the tensors that it consists of."""
    parts_of: dict[str, tuple[str, ...]] = {}
    float_activations = set(recipe.float_activations if recipe is not None else ())

    def treatment(module: str) -> tuple[Encoding, bool]:
        return encodings[f"{module}.weight"], module in float_activations

    for block in (f"model.layers.{number}.{part}" for number in range(sizes.layers) for part in FUSED_LAYERS):
        # Only neighbours with the same encoding and the same kind of activations can be one product.
        for _, alike in groupby(fusible_modules(block), key=treatment):
            fused = list(alike)
            for kind in ("weight", "bias"):
                parts = tuple(f"{module}.{kind}" for module in fused if f"{module}.{kind}" in shapes)
                if parts:
                    parts_of[f"{fused_name(fused)}.{kind}"] = parts
    in_fused = {part for parts in parts_of.values() for part in parts}
    return parts_of | {name: (name,) for name in shapes if name not in in_fused}
