"""How each graph variant computes attention over a KV cache that is written in place.

The cache buffers, ``[batch, kv_heads, capacity, head_dim]``, are bound as past and as present at once; otherwise ONNX
Runtime copies them in every pass.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from pos2d.exporter.formats.onnx.graph_builder import INT32, INT64, MICROSOFT, GraphBuilder
from pos2d.families import Dimensions
from pos2d.onnx_io import (
    ATTENTION_MASK,
    CACHE_LENGTHS,
    CACHE_PARTS,
    SEQLENS_K,
    TOTAL_SEQUENCE_LENGTH,
    GraphName,
    past_name,
    present_name,
)


class AttentionVariant(ABC):
    """The inputs of a graph variant that attention needs, and the attention nodes of every layer."""

    branches = True  # the graph takes branch and time of every token
    head_dim_multiple = 1  # the kernels need a head_dim that is a multiple of this
    opset = 21  # ONNX Runtime's CUDA provider has all operators of the graph in the versions that this opset names

    def __init__(self, builder: GraphBuilder, sizes: Dimensions) -> None:
        self.builder, self.sizes = builder, sizes

    @abstractmethod
    def __call__(self, layer: int, queries: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        """Attention of ``layer``: ``[batch, sequence, heads * head_dim]`` from the new tokens' queries, keys and
        values, ``[batch, sequence, width]``, over them and the cache."""

    def past(self, layer: int) -> list[ir.Value]:
        """Add the inputs for the cached keys and values of a layer."""
        return [self.builder.input(past_name(layer, part), self.builder.dtype, self._shape) for part in CACHE_PARTS]

    def present(self, layer: int, cache: list[ir.Value]) -> None:
        """Make the keys and values of a layer outputs."""
        for part, value in zip(CACHE_PARTS, cache, strict=True):
            self.builder.output(value, present_name(layer, part), self._shape)

    @property
    def _shape(self) -> list[int | str]:
        return ["batch", self.sizes.kv_heads, "capacity", self.sizes.head_dim]


class Causal(AttentionVariant):
    """Every token attends to all tokens before it. Without a mask ONNX Runtime uses its flash attention kernels."""

    head_dim_multiple = 8

    def __init__(self, builder: GraphBuilder, sizes: Dimensions) -> None:
        super().__init__(builder, sizes)
        self.last_index = builder.input(SEQLENS_K, INT32, ["batch"])
        self.total_length = builder.input(TOTAL_SEQUENCE_LENGTH, INT32, [])

    def __call__(self, layer: int, queries: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        return self.group_query_attention(layer, [queries, keys, values], None)

    def group_query_attention(self, layer: int, new: list[ir.Value], bias: ir.Value | None) -> ir.Value:
        """Attention with an optional additive mask; ``new`` are queries, keys and values."""
        mask: list[ir.Value | None] = [] if bias is None else [None, None, None, bias]
        attention, *present = self.builder.ops(
            "GroupQueryAttention",
            [*new, *self.past(layer), self.last_index, self.total_length, *mask],
            3,
            MICROSOFT,
            num_heads=self.sizes.heads,
            kv_num_heads=self.sizes.kv_heads,
            scale=self.sizes.head_dim**-0.5,
            # Only the mask decides: within a step a token may attend to one that comes after it in the sequence.
            **({} if bias is None else {"causal": 0}),
        )
        self.present(layer, present)
        return attention


class GenAI(Causal):
    """Sequences without branches, each padded after its tokens, with the inputs that onnxruntime-genai feeds."""

    branches = False

    def __init__(self, builder: GraphBuilder, sizes: Dimensions) -> None:
        AttentionVariant.__init__(self, builder, sizes)
        mask = builder.input(ATTENTION_MASK, INT64, ["batch", "total"])
        one, last_axis = (builder.constant(f"axis_{axis}", np.array([axis], dtype=np.int64)) for axis in (1, -1))
        tokens = builder.op("ReduceSum", [mask, last_axis], keepdims=0)
        self.last_index = builder.op("Cast", [builder.op("Sub", [tokens, one])], to=INT32)
        axis = builder.constant("total_axis", np.array(1, dtype=np.int64))
        length = builder.op("Gather", [builder.op("Shape", [mask]), axis])
        self.total_length = builder.op("Cast", [length], to=INT32)


class General(Causal):
    """One sequence, with any mask over its cache and its new tokens."""

    def __init__(self, builder: GraphBuilder, sizes: Dimensions) -> None:
        AttentionVariant.__init__(self, builder, sizes)
        mask = builder.input(ATTENTION_MASK, ir.DataType.BOOL, ["batch", 1, "sequence", "total"])
        self.last_index = builder.input(SEQLENS_K, INT32, ["batch"])
        self.bias = additive_mask(builder, mask)
        axis = builder.constant("total_axis", np.array(3, dtype=np.int64))
        length = builder.op("Gather", [builder.op("Shape", [self.bias]), axis])
        self.total_length = builder.op("Cast", [length], to=INT32)

    def __call__(self, layer: int, queries: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        return self.group_query_attention(layer, [queries, keys, values], self.bias)


class Batch(AttentionVariant):
    """Several sequences; each has its mask and its number of cached tokens."""

    opset = 24

    def __init__(self, builder: GraphBuilder, sizes: Dimensions) -> None:
        super().__init__(builder, sizes)
        mask = builder.input(ATTENTION_MASK, ir.DataType.BOOL, ["batch", 1, "sequence", "capacity"])
        self.cache_lengths = builder.input(CACHE_LENGTHS, INT64, ["batch"])
        self.bias = additive_mask(builder, mask)

    def __call__(self, layer: int, queries: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        builder, sizes, past = self.builder, self.sizes, self.past(layer)
        new = [self.heads_first(x, sizes.kv_heads) for x in (keys, values)]
        present = [
            builder.op("TensorScatter", [cached, x, self.cache_lengths], axis=-2)
            for cached, x in zip(past, new, strict=True)
        ]
        attention = builder.op(
            "Attention", [self.heads_first(queries, sizes.heads), *present, self.bias], scale=sizes.head_dim**-0.5
        )
        self.present(layer, present)
        joined = builder.join_heads_shape()
        return builder.op("Reshape", [builder.op("Transpose", [attention], perm=[0, 2, 1, 3]), joined])

    def heads_first(self, x: ir.Value, heads: int) -> ir.Value:
        """``[batch, sequence, heads * head_dim]`` as ``[batch, heads, sequence, head_dim]``."""
        shape = self.builder.split_heads_shape(heads, self.sizes.head_dim)
        return self.builder.op("Transpose", [self.builder.op("Reshape", [x, shape])], perm=[0, 2, 1, 3])


def additive_mask(builder: GraphBuilder, mask: ir.Value) -> ir.Value:
    """The bias for attention scores: 0 where ``mask`` is true, else the lowest finite value.

    Minus infinity would make a row in which nothing is allowed NaN.
    """
    dtype = builder.dtype.numpy()
    allowed = builder.constant("allowed", np.array(0, dtype=dtype))
    return builder.op(
        "Where", [mask, allowed, builder.constant("forbidden", np.array(np.finfo(dtype).min, dtype=dtype))]
    )


ATTENTION_VARIANTS: Mapping[GraphName, type[AttentionVariant]] = {
    "causal": Causal,
    "general": General,
    "batch": Batch,
    "genai": GenAI,
}
