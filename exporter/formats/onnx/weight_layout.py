"""The one file of weights under all graphs of an artifact: what lies where, before any of it is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from pos2d.exporter.inputs.checkpoint import EMBEDDING, HEAD, LM_HEAD, SAFETENSORS_NAMES, TensorPlace
from pos2d.exporter.quantisation.encodings import BlockBits, Encoding, Rounded
from pos2d.exporter.tensors.plan import MergePlan, PlannedTensor
from pos2d.families import Dimensions
from pos2d.graph_recipe import GraphRecipe

DATA_FILE = "model.onnx.data"
# Large tensors begin at a page, so that they can be mapped; small ones where a cache line does.
PAGE, LINE = 4096, 64
# Layers that read the same input are written one under the other, and are then one product.
SIDE_BY_SIDE = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
# GatherBlockQuantized has no smaller blocks, and no padded ones.
MIN_BLOCK = 16


@dataclass(frozen=True, slots=True, eq=False)
class GraphWeight:
    """Rows of ``parts``, one part under the other, as ``encoding`` writes them; ``places`` has what is written."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[PlannedTensor, ...]
    encoding: Encoding
    places: Mapping[str, TensorPlace]


@dataclass(frozen=True, slots=True, eq=False)
class GraphWeights:
    """Every weight by name; ``dtype`` is torch's name of the type of activations, cache and what is not quantised."""

    weights: Mapping[str, GraphWeight]
    dtype: str
    tied: bool
    nbytes: int


def lay_out_weights(plan: MergePlan, sizes: Dimensions, dtype: str, recipe: GraphRecipe | None) -> GraphWeights:
    """What is written where."""
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    encodings = {name: _encoding(tensor, dtype, recipe) for name, tensor in tensors.items()}
    weights: dict[str, GraphWeight] = {}
    end = 0
    for name, parts in _groups(tensors, encodings, sizes, recipe).items():
        first = tensors[parts[0]].target.shape
        shape = (sum(tensors[part].target.shape[0] for part in parts), *first[1:])
        places = {}
        for output, (kind, dims) in encodings[parts[0]].outputs(name, shape).items():
            nbytes = TensorPlace(DATA_FILE, dims, kind).nbytes
            step = PAGE if nbytes >= PAGE else LINE
            places[output] = TensorPlace(DATA_FILE, dims, kind, -(-end // step) * step)
            end = places[output].offset + nbytes
        weights[name] = GraphWeight(name, shape, tuple(tensors[p] for p in parts), encodings[parts[0]], places)
    return GraphWeights(weights, dtype, plan.tied, end)


def _encoding(tensor: PlannedTensor, dtype: str, recipe: GraphRecipe | None) -> Encoding:
    plain = Rounded(SAFETENSORS_NAMES[dtype])
    # A tied embedding is the head's own bytes, an untied one is stored as the head is.
    module = LM_HEAD if tensor.name in (EMBEDDING, HEAD) else tensor.name.removesuffix(".weight")
    bits = recipe.bits.get(module) if recipe is not None else None
    if recipe is None or bits is None:
        return plain
    block = recipe.block_size
    if tensor.name == EMBEDDING:
        block = min(block, embedding_block(tensor.target.shape[1]))
        if block < MIN_BLOCK:
            return plain
    return BlockBits(bits, block, plain.dtype)


def embedding_block(hidden: int) -> int:
    """The largest block, a power of two, that rows of ``hidden`` values are made of."""
    return hidden & -hidden


def _groups(
    tensors: Mapping[str, PlannedTensor],
    encodings: Mapping[str, Encoding],
    sizes: Dimensions,
    recipe: GraphRecipe | None,
) -> dict[str, tuple[str, ...]]:
    """Name of every weight of the graphs, and the tensors that it is made of."""
    groups: dict[str, tuple[str, ...]] = {}
    members: set[str] = set()
    floating = set(recipe.float_activations if recipe is not None else ())
    for block in (f"model.layers.{number}.{part}" for number in range(sizes.layers) for part in SIDE_BY_SIDE):
        modules = [f"{block}.{module}" for module in SIDE_BY_SIDE[block.rpartition(".")[2]]]
        # Neighbours that are treated alike become one.
        for _, alike in groupby(modules, key=lambda module: (encodings[f"{module}.weight"], module in floating)):
            run = list(alike)
            for kind in ("weight", "bias"):
                parts = tuple(f"{module}.{kind}" for module in run if f"{module}.{kind}" in tensors)
                if parts:
                    groups[f"{fused_name(run)}.{kind}"] = parts
                    members |= set(parts)
    return groups | {name: (name,) for name in tensors if name not in members}


def fused_name(modules: Sequence[str]) -> str:
    """``….mlp.gate_up_proj`` of ``….mlp.gate_proj`` and ``….mlp.up_proj``."""
    block = modules[0].rpartition(".")[0]
    return f"{block}.{'_'.join(module.rpartition('.')[2].removesuffix('_proj') for module in modules)}_proj"
