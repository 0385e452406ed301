"""The decoder as ONNX graphs, node by node, over one file of weights.

One builder for Llama, Mistral, Qwen2 and Qwen3: they differ in biases and in a norm on queries and keys. Positions and
mask are inputs, so the graphs hold no rule about branches; ``docs/onnx-graph.md`` documents them for other drivers. The
graphs differ in how they attend, which is all that :mod:`pos2d.exporter.formats.onnx.attention` holds.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from pos2d.exporter.formats.onnx.attention import Attending
from pos2d.exporter.formats.onnx.graph_builder import INT64, MICROSOFT, GraphTape
from pos2d.exporter.formats.onnx.weight_layout import SIDE_BY_SIDE, GraphWeight, GraphWeights, fused_name
from pos2d.exporter.inputs.checkpoint import EMBEDDING, HEAD
from pos2d.exporter.quantisation.encodings import BlockBits
from pos2d.families import Dimensions
from pos2d.graph_recipe import GraphRecipe
from pos2d.spec import Rope2DSpec

IR_VERSION = 10
ACTIVATIONS_INT8, ACTIVATIONS_FLOAT = 4, 0


def build_decoder(
    sizes: Dimensions,
    spec: Rope2DSpec,
    inv_freq: np.ndarray,
    attention_scaling: float,
    weights: GraphWeights,
    recipe: GraphRecipe | None,
    attending: type[Attending],
) -> ir.Model:
    """A decoder with its KV cache as inputs and outputs. ``inv_freq`` is float32 ``[F]``."""
    decoder = _Decoder(sizes, weights, recipe)
    tape = decoder.tape
    ids, positions, pos2d = (
        tape.input("input_ids", INT64, ["batch", "sequence"]),
        tape.input("position_ids", INT64, ["batch", "sequence"]),
        tape.input("pos2d", INT64, ["batch", "sequence", 2]),
    )
    attend = attending(tape, sizes)
    rows = tape.input("logits_rows", INT64, ["batch", "rows"])
    angles = decoder.angles(positions, pos2d, spec, inv_freq, attention_scaling)

    hidden = decoder.embed(ids)
    normed = decoder.norm(hidden, "model.layers.0.input_layernorm.weight")
    for number in range(sizes.layers):
        layer = f"model.layers.{number}"
        after = f"model.layers.{number + 1}.input_layernorm" if number + 1 < sizes.layers else "model.norm"
        queries, keys, values = decoder.projections(normed, number, angles)
        mixed = attend(number, queries, keys, values)
        mixed = decoder.linear(mixed, f"{layer}.self_attn.o_proj")
        normed, hidden = decoder.add_and_norm(hidden, mixed, f"{layer}.post_attention_layernorm.weight")
        normed, hidden = decoder.add_and_norm(hidden, decoder.mlp(normed, layer), f"{after}.weight")
    tape.output(decoder.head(normed, rows), "logits", ["batch", "rows", sizes.vocab], first=True)
    return tape.model(attend.opset, IR_VERSION)


class _Decoder:
    """The parts of a decoder, one method each."""

    def __init__(self, sizes: Dimensions, weights: GraphWeights, recipe: GraphRecipe | None) -> None:
        self.sizes, self.weights, self.recipe = sizes, weights, recipe
        self.tape = GraphTape(weights.dtype)

    def tensor(self, name: str) -> ir.Value:
        """A weight that is stored as it is."""
        return self.tape.stored(name, self.weights.weights[name].places[name])

    def linear(self, x: ir.Value, module: str) -> ir.Value:
        bias = self.tensor(f"{module}.bias") if f"{module}.bias" in self.weights.weights else None
        return self.product(x, self.weights.weights[f"{module}.weight"], bias, module)

    def product(self, x: ir.Value, weight: GraphWeight, bias: ir.Value | None, module: str) -> ir.Value:
        """``x @ W.T + bias`` with the weight as it is stored, ``[out, in]``."""
        if not isinstance(weight.encoding, BlockBits):
            product = self.tape.op("FusedMatMul", [x, self.tensor(weight.name)], MICROSOFT, transB=1)
            return product if bias is None else self.tape.op("Add", [product, bias])
        packed, scales = (self.tape.stored(name, place) for name, place in weight.places.items())
        return self.tape.op(
            "MatMulNBits",
            [x, packed, scales, *([None, None, bias] if bias is not None else [])],
            MICROSOFT,
            N=weight.shape[0],
            K=weight.shape[1],
            bits=weight.encoding.bits,
            block_size=weight.encoding.block,
            accuracy_level=self.accuracy_level(weight, module),
        )

    def accuracy_level(self, weight: GraphWeight, module: str) -> int:
        parts = {part.name.removesuffix(".weight") for part in weight.parts} | {module}
        floating = self.recipe is not None and parts & set(self.recipe.float_activations)
        return ACTIVATIONS_FLOAT if floating else ACTIVATIONS_INT8

    def side_by_side(self, x: ir.Value, block: str, widths: Sequence[int]) -> Sequence[ir.Value]:
        """The products of the layers of ``block`` that have the same input, however many of them are one product."""
        modules = [f"{block}.{module}" for module in SIDE_BY_SIDE[block.rpartition(".")[2]]]
        products: list[ir.Value] = []
        while len(products) < len(modules):
            first = len(products)
            ends = range(len(modules), first, -1)
            last = next(e for e in ends if f"{fused_name(modules[first:e])}.weight" in self.weights.weights)
            product = self.linear(x, fused_name(modules[first:last]))
            products += self.tape.split(product, widths[first:last]) if last > first + 1 else [product]
        return products

    def embed(self, ids: ir.Value) -> ir.Value:
        weight = self.weights.weights[EMBEDDING]
        if not isinstance(weight.encoding, BlockBits):
            return self.tape.op("Gather", [self.tensor(EMBEDDING), ids])
        packed, scales = weight.places.items()
        # The same bytes as the head's, row by row.
        flat = self.tape.stored(f"{EMBEDDING}.rows", packed[1], shape=(weight.shape[0], -1))
        return self.tape.op(
            "GatherBlockQuantized",
            [flat, ids, self.tape.stored(*scales)],
            MICROSOFT,
            bits=weight.encoding.bits,
            block_size=weight.encoding.block,
            gather_axis=0,
            quantize_axis=1,
        )

    def head(self, normed: ir.Value, rows: ir.Value) -> ir.Value:
        """Logits of those tokens alone that ``rows`` names."""
        last = self.tape.constant("last_axis", np.array([-1], dtype=np.int64))
        chosen = self.tape.op("GatherND", [normed, self.tape.op("Unsqueeze", [rows, last])], batch_dims=1)
        name = EMBEDDING if self.weights.tied else HEAD
        return self.product(chosen, self.weights.weights[name], None, "lm_head")

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        return self.tape.op(
            "SimplifiedLayerNormalization", [x, self.tensor(name)], axis=-1, epsilon=self.sizes.norm_eps
        )

    def add_and_norm(self, hidden: ir.Value, update: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        """The norm of the sum, and the sum."""
        normed, _, _, total = self.tape.ops(
            "SkipSimplifiedLayerNormalization",
            [hidden, update, self.tensor(name)],
            4,
            MICROSOFT,
            epsilon=self.sizes.norm_eps,
        )
        return normed, total

    def angles(
        self, positions: ir.Value, pos2d: ir.Value, spec: Rope2DSpec, inv_freq: np.ndarray, attention_scaling: float
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The number of every token, and cosine and sine ``[tokens, F]``, made once and shared by every layer."""
        tape = self.tape
        last = tape.constant("last_axis", np.array([-1], dtype=np.int64))
        three = tape.op("Concat", [tape.op("Unsqueeze", [positions, last]), pos2d], axis=-1)
        axes = tape.constant("rope_axes", np.array(spec.axes, dtype=np.int64))
        chosen = tape.op("Cast", [tape.op("Gather", [three, axes], axis=2)], to=ir.DataType.FLOAT)
        flat = tape.op("Reshape", [chosen, tape.constant("rope_rows", np.array([-1, len(spec.axes)], dtype=np.int64))])
        angles = tape.op("Mul", [flat, tape.constant("rope_inv_freq", inv_freq.astype(np.float32))])
        tables = [tape.op("Cos", [angles]), tape.op("Sin", [angles])]
        if attention_scaling != 1.0:
            scaling = tape.constant("rope_attention_scaling", np.array(attention_scaling, dtype=np.float32))
            tables = [tape.op("Mul", [table, scaling]) for table in tables]
        if tape.dtype != ir.DataType.FLOAT:
            tables = [tape.op("Cast", [table], to=tape.dtype) for table in tables]
        shape = tape.op("Shape", [positions])
        count = tape.op("ReduceProd", [shape], keepdims=0)
        zero, one = (tape.constant(f"number_{n}", np.array(n, dtype=np.int64)) for n in (0, 1))
        numbers = tape.op("Reshape", [tape.op("Range", [zero, count, one]), shape])
        return numbers, tables[0], tables[1]

    def projections(
        self, x: ir.Value, number: int, angles: tuple[ir.Value, ir.Value, ir.Value]
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Queries and keys, normed where the family does that and turned, and values, ``[batch, sequence, width]``."""
        sizes, block = self.sizes, f"model.layers.{number}.self_attn"
        wide, narrow = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        if f"{block}.q_k_v_proj.weight" in self.weights.weights and not sizes.qk_norm:
            # Queries and keys turn alike, so they turn together.
            both, values = self.tape.split(self.linear(x, f"{block}.q_k_v_proj"), (wide + narrow, narrow))
            queries, keys = self.tape.split(self.turn(both, sizes.heads + sizes.kv_heads, angles), (wide, narrow))
            return queries, keys, values
        queries, keys, values = self.side_by_side(x, block, (wide, narrow, narrow))
        if sizes.qk_norm:
            queries = self.head_norm(queries, f"{block}.q_norm.weight", sizes.heads)
            keys = self.head_norm(keys, f"{block}.k_norm.weight", sizes.kv_heads)
        return self.turn(queries, sizes.heads, angles), self.turn(keys, sizes.kv_heads, angles), values

    def head_norm(self, x: ir.Value, name: str, count: int) -> ir.Value:
        split = self.tape.constant(f"split_{count}", np.array([0, 0, count, self.sizes.head_dim], dtype=np.int64))
        joined = self.tape.constant("join_heads", np.array([0, 0, -1], dtype=np.int64))
        return self.tape.op("Reshape", [self.norm(self.tape.op("Reshape", [x, split]), name), joined])

    def turn(self, x: ir.Value, count: int, angles: tuple[ir.Value, ir.Value, ir.Value]) -> ir.Value:
        return self.tape.op("RotaryEmbedding", [x, *angles], MICROSOFT, num_heads=count)

    def mlp(self, x: ir.Value, layer: str) -> ir.Value:
        width = self.sizes.intermediate
        gate, up = self.side_by_side(x, f"{layer}.mlp", (width, width))
        swish = self.tape.op("Mul", [gate, self.tape.op("Sigmoid", [gate])])
        return self.linear(self.tape.op("Mul", [swish, up]), f"{layer}.mlp.down_proj")
