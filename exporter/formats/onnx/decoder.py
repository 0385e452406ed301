"""The decoder as an ONNX graph, built node by node over the weight file.

One builder serves Llama, Mistral, Qwen2 and Qwen3, which differ in biases and in the norm of queries and keys.
Positions and mask are inputs, so a graph knows nothing of branches; ``docs/onnx-graph.md`` documents the inputs for
other programs. Graph variants differ only in attention, which :mod:`pos2d.exporter.formats.onnx.attention` builds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from pos2d.exporter.formats.onnx.attention import AttentionVariant
from pos2d.exporter.formats.onnx.graph_builder import INT64, MICROSOFT, GraphBuilder
from pos2d.exporter.formats.onnx.weight_layout import GraphWeight, WeightLayout, fusible_modules
from pos2d.exporter.quantisation.encodings import BlockBits
from pos2d.families import Dimensions
from pos2d.onnx_io import INPUT_IDS, LOGITS, LOGITS_ROWS, POS2D, POSITION_IDS, fused_name
from pos2d.recipes import GraphRecipe
from pos2d.sources.checkpoints.checkpoint import EMBEDDING, HEAD, LM_HEAD
from pos2d.spec import BRANCH, Rope2DSpec

IR_VERSION = 10
# MatMulNBits: activations are rounded to 8 bits, or stay as they are.
ACCURACY_INT8, ACCURACY_FLOAT = 4, 0


class RotaryTables(NamedTuple):
    """What RotaryEmbedding takes: for every token the row of the tables, ``[batch, sequence]``, and the tables, cosine
    and sine ``[batch * sequence, F]``."""

    rows: ir.Value
    cos: ir.Value
    sin: ir.Value


def build_decoder(
    sizes: Dimensions,
    spec: Rope2DSpec,
    inv_freq: np.ndarray,
    attention_scaling: float,
    layout: WeightLayout,
    recipe: GraphRecipe | None,
    variant: type[AttentionVariant],
) -> ir.Model:
    """Build a decoder whose KV cache is inputs and outputs. ``inv_freq`` is float32 ``[F]``.

    A variant without branches takes positions alone and returns the logits of every token.
    """
    decoder = _Decoder(sizes, layout, recipe)
    builder = decoder.builder
    ids, positions = (builder.input(name, INT64, ["batch", "sequence"]) for name in (INPUT_IDS, POSITION_IDS))
    pos2d = builder.input(POS2D, INT64, ["batch", "sequence", 2]) if variant.branches else None
    attention = variant(builder, sizes)
    logits_rows = builder.input(LOGITS_ROWS, INT64, ["batch", "rows"]) if variant.branches else None
    tables = decoder.rotary_tables(positions, pos2d, spec, inv_freq, attention_scaling)

    hidden = decoder.embed(ids)
    normed = decoder.norm(hidden, "model.layers.0.input_layernorm.weight")
    for number in range(sizes.layers):
        layer = f"model.layers.{number}"
        next_norm = f"model.layers.{number + 1}.input_layernorm" if number + 1 < sizes.layers else "model.norm"
        queries, keys, values = decoder.queries_keys_values(normed, layer, tables)
        update = decoder.linear(attention(number, queries, keys, values), f"{layer}.self_attn.o_proj")
        normed, hidden = decoder.add_and_norm(hidden, update, f"{layer}.post_attention_layernorm.weight")
        normed, hidden = decoder.add_and_norm(hidden, decoder.mlp(normed, layer), f"{next_norm}.weight")
    rows = "sequence" if logits_rows is None else "rows"
    builder.output(decoder.head(normed, logits_rows), LOGITS, ["batch", rows, sizes.vocab], first=True)
    return builder.model(attention.opset, IR_VERSION)


class _Decoder:
    """The parts of a decoder, one method each; activations are ``[batch, sequence, width]``."""

    def __init__(self, sizes: Dimensions, layout: WeightLayout, recipe: GraphRecipe | None) -> None:
        self.sizes, self.weights, self.tied, self.recipe = sizes, layout.weights, layout.tied, recipe
        self.builder = GraphBuilder(layout.dtype)

    def unquantised(self, name: str) -> ir.Value:
        """A weight that is not quantised: it is stored as one tensor with its name and shape."""
        return self.builder.weight(name, self.weights[name].places[name])

    def linear(self, x: ir.Value, module: str) -> ir.Value:
        """A linear layer, or several that are fused."""
        bias = self.unquantised(f"{module}.bias") if f"{module}.bias" in self.weights else None
        return self.product(x, self.weights[f"{module}.weight"], bias, module)

    def product(self, x: ir.Value, weight: GraphWeight, bias: ir.Value | None, module: str) -> ir.Value:
        """``x @ W.T + bias`` with a stored ``W`` of ``[out, in]``."""
        if not isinstance(weight.encoding, BlockBits):
            product = self.builder.op("FusedMatMul", [x, self.unquantised(weight.name)], MICROSOFT, transB=1)
            return product if bias is None else self.builder.op("Add", [product, bias])
        packed, scales = (self.builder.weight(name, place) for name, place in weight.places.items())
        return self.builder.op(
            "MatMulNBits",
            [x, packed, scales, *([None, None, bias] if bias is not None else [])],
            MICROSOFT,
            N=weight.shape[0],
            K=weight.shape[1],
            bits=weight.encoding.bits,
            block_size=weight.encoding.block_size,
            accuracy_level=self.accuracy_level(weight, module),
        )

    def accuracy_level(self, weight: GraphWeight, module: str) -> int:
        """MatMulNBits' attribute: float activations where the recipe has them for a part of ``weight``."""
        modules = {part.removesuffix(".weight") for part in weight.parts} | {module}
        has_float = self.recipe is not None and modules & set(self.recipe.float_activations)
        return ACCURACY_FLOAT if has_float else ACCURACY_INT8

    def projections(self, x: ir.Value, block: str, widths: Sequence[int]) -> Sequence[ir.Value]:
        """The outputs of the layers of ``block`` that share the input ``x``, computed in one product or several.

        ``widths`` are the layers' numbers of outputs.
        """
        modules = fusible_modules(block)
        outputs: list[ir.Value] = []
        while len(outputs) < len(modules):
            first = len(outputs)
            ends = range(len(modules), first, -1)
            last = next(end for end in ends if f"{fused_name(modules[first:end])}.weight" in self.weights)
            product = self.linear(x, fused_name(modules[first:last]))
            outputs += self.builder.split(product, widths[first:last]) if last > first + 1 else [product]
        return outputs

    def embed(self, ids: ir.Value) -> ir.Value:
        """Embeddings of tokens ``[batch, sequence]``."""
        weight = self.weights[EMBEDDING]
        if not isinstance(weight.encoding, BlockBits):
            return self.builder.op("Gather", [self.unquantised(EMBEDDING), ids])
        packed, scales = weight.places.items()
        # MatMulNBits reads the same bytes as [rows, blocks, bytes]; a gather needs one axis for a row.
        rows = self.builder.weight(f"{EMBEDDING}.rows", packed[1], shape=(weight.shape[0], -1))
        return self.builder.op(
            "GatherBlockQuantized",
            [rows, ids, self.builder.weight(*scales)],
            MICROSOFT,
            bits=weight.encoding.bits,
            block_size=weight.encoding.block_size,
            gather_axis=0,
            quantize_axis=1,
        )

    def head(self, normed: ir.Value, logits_rows: ir.Value | None) -> ir.Value:
        """Logits ``[batch, rows, vocab]`` of the tokens at the indices ``logits_rows``, ``[batch, rows]``, or of
        all."""
        if logits_rows is not None:
            last_axis = self.builder.constant("last_axis", np.array([-1], dtype=np.int64))
            indices = self.builder.op("Unsqueeze", [logits_rows, last_axis])
            normed = self.builder.op("GatherND", [normed, indices], batch_dims=1)
        return self.product(normed, self.weights[EMBEDDING if self.tied else HEAD], None, LM_HEAD)

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        """RMS norm over the last axis."""
        return self.builder.op(
            "SimplifiedLayerNormalization", [x, self.unquantised(name)], axis=-1, epsilon=self.sizes.norm_eps
        )

    def add_and_norm(self, hidden: ir.Value, update: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        """The RMS norm of the sum, and the sum."""
        normed, _, _, total = self.builder.ops(
            "SkipSimplifiedLayerNormalization",
            [hidden, update, self.unquantised(name)],
            4,
            MICROSOFT,
            epsilon=self.sizes.norm_eps,
        )
        return normed, total

    def rotary_tables(
        self,
        positions: ir.Value,
        pos2d: ir.Value | None,
        spec: Rope2DSpec,
        inv_freq: np.ndarray,
        attention_scaling: float,
    ) -> RotaryTables:
        """The tables of this pass's tokens, computed once for all layers.

        Every frequency is multiplied by the position, branch or time of the token, as the axes of ``spec`` say. Without
        ``pos2d`` the sequence is one branch: its branch value is 0, and its times are its positions.
        """
        builder = self.builder
        last_axis = builder.constant("last_axis", np.array([-1], dtype=np.int64))
        turned_by = builder.op("Unsqueeze", [positions, last_axis])
        if pos2d is None:
            inv_freq = np.where(np.array(spec.axes) == BRANCH, 0, inv_freq)
        else:
            three = builder.op("Concat", [turned_by, pos2d], axis=-1)
            axes = builder.constant("rope_axes", np.array(spec.axes, dtype=np.int64))
            turned_by = builder.op("Gather", [three, axes], axis=2)
        width = 1 if pos2d is None else len(spec.axes)
        table_shape = builder.constant("rope_rows", np.array([-1, width], dtype=np.int64))
        flat = builder.op("Reshape", [builder.op("Cast", [turned_by], to=ir.DataType.FLOAT), table_shape])
        angles = builder.op("Mul", [flat, builder.constant("rope_inv_freq", inv_freq.astype(np.float32))])
        tables = [builder.op("Cos", [angles]), builder.op("Sin", [angles])]
        if attention_scaling != 1.0:
            scaling = builder.constant("rope_attention_scaling", np.array(attention_scaling, dtype=np.float32))
            tables = [builder.op("Mul", [table, scaling]) for table in tables]
        if builder.dtype != ir.DataType.FLOAT:
            tables = [builder.op("Cast", [table], to=builder.dtype) for table in tables]
        shape = builder.op("Shape", [positions])
        count = builder.op("ReduceProd", [shape], keepdims=0)
        zero, one = (builder.constant(f"number_{n}", np.array(n, dtype=np.int64)) for n in (0, 1))
        rows = builder.op("Reshape", [builder.op("Range", [zero, count, one]), shape])
        return RotaryTables(rows, *tables)

    def queries_keys_values(self, x: ir.Value, layer: str, tables: RotaryTables) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Queries and keys, rotated (and before that normed, in families that do so), and values."""
        sizes, block = self.sizes, f"{layer}.self_attn"
        q_width, kv_width = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        fused = fused_name(fusible_modules(block))
        if f"{fused}.weight" in self.weights and not sizes.qk_norm:
            # Queries and keys are rotated alike, so one node rotates both.
            product = self.linear(x, fused)
            both, values = self.builder.split(product, (q_width + kv_width, kv_width))
            rotated = self.rotate(both, sizes.heads + sizes.kv_heads, tables)
            queries, keys = self.builder.split(rotated, (q_width, kv_width))
            return queries, keys, values
        queries, keys, values = self.projections(x, block, (q_width, kv_width, kv_width))
        if sizes.qk_norm:
            queries = self.head_norm(queries, f"{block}.q_norm.weight", sizes.heads)
            keys = self.head_norm(keys, f"{block}.k_norm.weight", sizes.kv_heads)
        return self.rotate(queries, sizes.heads, tables), self.rotate(keys, sizes.kv_heads, tables), values

    def head_norm(self, x: ir.Value, name: str, heads: int) -> ir.Value:
        """RMS norm of every head."""
        split, joined = self.builder.split_heads_shape(heads, self.sizes.head_dim), self.builder.join_heads_shape()
        return self.builder.op("Reshape", [self.norm(self.builder.op("Reshape", [x, split]), name), joined])

    def rotate(self, x: ir.Value, heads: int, tables: RotaryTables) -> ir.Value:
        """RoPE of ``[batch, sequence, heads * head_dim]``."""
        return self.builder.op("RotaryEmbedding", [x, *tables], MICROSOFT, num_heads=heads)

    def mlp(self, x: ir.Value, layer: str) -> ir.Value:
        """``down_proj(silu(gate_proj(x)) * up_proj(x))``."""
        width = self.sizes.intermediate
        gate, up = self.projections(x, f"{layer}.mlp", (width, width))
        swish = self.builder.op("Mul", [gate, self.builder.op("Sigmoid", [gate])])
        return self.linear(self.builder.op("Mul", [swish, up]), f"{layer}.mlp.down_proj")
