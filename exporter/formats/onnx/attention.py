"""The three ways in which the graphs attend over a cache that is written in place.

All need buffers ``[batch, kv_heads, capacity, head_dim]``, bound as past and as present at once; without that, ONNX
Runtime copies them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir

from pos2d.exporter.formats.onnx.graph_builder import INT32, INT64, MICROSOFT, GraphTape
from pos2d.families import Dimensions

Graph = Literal["causal", "general", "batch"]


class Attending(ABC):
    """One graph's inputs for attention, and its node of every layer."""

    head_dims = 1  # these have to be multiples of it
    opset = 21  # where ONNX Runtime's CUDA kernels know every operator of the graph in the version that it names

    def __init__(self, tape: GraphTape, sizes: Dimensions) -> None:
        self.tape, self.sizes = tape, sizes

    @abstractmethod
    def __call__(self, number: int, queries: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        """What layer ``number`` mixes, ``[batch, sequence, heads * head_dim]``, from new queries, keys and values."""

    def past(self, number: int) -> list[ir.Value]:
        return [self.tape.input(f"past_key_values.{number}.{kind}", self.tape.dtype, self._shape) for kind in KINDS]

    def present(self, number: int, values: list[ir.Value]) -> None:
        for kind, value in zip(KINDS, values, strict=True):
            self.tape.output(value, f"present.{number}.{kind}", self._shape)

    @property
    def _shape(self) -> list[int | str]:
        return ["batch", self.sizes.kv_heads, "capacity", self.sizes.head_dim]


KINDS = ("key", "value")


class Causal(Attending):
    """One branch a row: every token sees all before it. No mask, so that ONNX Runtime's flash kernels apply."""

    head_dims = 8

    def __init__(self, tape: GraphTape, sizes: Dimensions) -> None:
        super().__init__(tape, sizes)
        self.last = tape.input("seqlens_k", INT32, ["batch"])
        self.total = tape.input("total_sequence_length", INT32, [])

    def __call__(self, number: int, queries: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        return self.group_query(number, [queries, keys, values], None)

    def group_query(self, number: int, new: list[ir.Value], bias: ir.Value | None) -> ir.Value:
        masked: list[ir.Value | None] = [] if bias is None else [None, None, None, bias]
        mixed, *present = self.tape.ops(
            "GroupQueryAttention",
            [*new, *self.past(number), self.last, self.total, *masked],
            3,
            MICROSOFT,
            num_heads=self.sizes.heads,
            kv_num_heads=self.sizes.kv_heads,
            scale=self.sizes.head_dim**-0.5,
            # The mask alone decides, because in a step a token may see one that stands after it.
            **({} if bias is None else {"causal": 0}),
        )
        self.present(number, present)
        return mixed


class General(Causal):
    """Any mask over the cache and the new tokens of one sequence."""

    def __init__(self, tape: GraphTape, sizes: Dimensions) -> None:
        Attending.__init__(self, tape, sizes)
        mask = tape.input("attention_mask", ir.DataType.BOOL, ["batch", 1, "sequence", "total"])
        self.last = tape.input("seqlens_k", INT32, ["batch"])
        self.bias = bias_of(tape, mask)
        axis = tape.constant("total_axis", np.array(3, dtype=np.int64))
        self.total = tape.op("Cast", [tape.op("Gather", [tape.op("Shape", [self.bias]), axis])], to=INT32)

    def __call__(self, number: int, queries: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        return self.group_query(number, [queries, keys, values], self.bias)


class Batch(Attending):
    """Any mask for several sequences, each with its own number of tokens in the cache."""

    opset = 24

    def __init__(self, tape: GraphTape, sizes: Dimensions) -> None:
        super().__init__(tape, sizes)
        mask = tape.input("attention_mask", ir.DataType.BOOL, ["batch", 1, "sequence", "capacity"])
        self.lengths = tape.input("cache_lengths", INT64, ["batch"])
        self.bias = bias_of(tape, mask)

    def __call__(self, number: int, queries: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        sizes, past = self.sizes, self.past(number)
        new = [self.split(x, sizes.kv_heads) for x in (keys, values)]
        written = [
            self.tape.op("TensorScatter", [room, x, self.lengths], axis=-2) for room, x in zip(past, new, strict=True)
        ]
        mixed = self.tape.op(
            "Attention", [self.split(queries, sizes.heads), *written, self.bias], scale=sizes.head_dim**-0.5
        )
        self.present(number, written)
        joined = self.tape.constant("join_heads", np.array([0, 0, -1], dtype=np.int64))
        return self.tape.op("Reshape", [self.tape.op("Transpose", [mixed], perm=[0, 2, 1, 3]), joined])

    def split(self, x: ir.Value, count: int) -> ir.Value:
        """``[batch, count, sequence, head_dim]``."""
        shape = self.tape.constant(f"split_{count}", np.array([0, 0, count, self.sizes.head_dim], dtype=np.int64))
        return self.tape.op("Transpose", [self.tape.op("Reshape", [x, shape])], perm=[0, 2, 1, 3])


def bias_of(tape: GraphTape, mask: ir.Value) -> ir.Value:
    """What is added to the scores: 0 where the mask allows, and the lowest finite value where it does not."""
    kind = tape.dtype.numpy()
    allowed = tape.constant("allowed", np.array(0, dtype=kind))
    return tape.op("Where", [mask, allowed, tape.constant("forbidden", np.array(np.finfo(kind).min, dtype=kind))])


ATTENDING: Mapping[Graph, type[Attending]] = {"causal": Causal, "general": General, "batch": Batch}
