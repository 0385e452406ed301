"""Collects the nodes, inputs, outputs and initialisers of one graph."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from pos2d.sources.files.tensor_places import TensorPlace

MICROSOFT = "com.microsoft"
INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64
# By safetensors' name and by torch's name.
TYPES = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "U8": ir.DataType.UINT8,
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
}

Attribute = int | float | ir.DataType | Sequence[int]


class GraphBuilder:
    """Nodes in the order in which they were added; ``dtype`` is the type of activations, KV cache and all outputs."""

    def __init__(self, dtype: str) -> None:
        self.dtype = TYPES[dtype]
        self._nodes = Tape()
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}

    def op(self, kind: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Attribute) -> ir.Value:
        """Add a node and return its output."""
        return self._nodes.op(kind, inputs, attributes, domain=domain)

    def ops(
        self, kind: str, inputs: Sequence[ir.Value | None], outputs: int, domain: str = "", **attributes: Attribute
    ) -> Sequence[ir.Value]:
        """Add a node with several outputs and return them."""
        return self._nodes.op_multi_out(kind, inputs, attributes, num_outputs=outputs, domain=domain)

    def split(self, x: ir.Value, widths: Sequence[int]) -> Sequence[ir.Value]:
        """Split the last axis of ``x`` into parts of these widths."""
        sizes = self.constant(f"split_{'_'.join(map(str, widths))}", np.array(widths, dtype=np.int64))
        return self.ops("Split", [x, sizes], len(widths), axis=-1)

    def split_heads_shape(self, heads: int, head_dim: int) -> ir.Value:
        """The shape with which Reshape makes ``[batch, sequence, heads, head_dim]``."""
        return self.constant(f"split_{heads}", np.array([0, 0, heads, head_dim], dtype=np.int64))

    def join_heads_shape(self) -> ir.Value:
        """The shape with which Reshape makes ``[batch, sequence, heads * head_dim]``."""
        return self.constant("join_heads", np.array([0, 0, -1], dtype=np.int64))

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Add an input of the graph."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, shape: Sequence[int | str], *, first: bool = False) -> None:
        """Make ``value`` an output of the graph, before all others if ``first``, else after them."""
        value.name, value.type, value.shape = name, ir.TensorType(self.dtype), ir.Shape(shape)
        self._outputs.insert(0 if first else len(self._outputs), value)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """An initialiser that is stored in the graph's file; equal names must have equal values."""
        return self._initializer(ir.tensor(array, name=name))

    def weight(self, name: str, place: TensorPlace, shape: tuple[int, ...] = ()) -> ir.Value:
        """An initialiser in the weight file; ``shape`` is another shape for the same bytes, with at most one -1."""
        if -1 in shape:
            shape = (shape[0], place.elements // shape[0])
        tensor = ir.ExternalTensor(
            place.file, place.offset, place.nbytes, TYPES[place.dtype], shape=ir.Shape(shape or place.shape), name=name
        )
        return self._initializer(tensor)

    def model(self, opset: int, ir_version: int) -> ir.Model:
        """The finished model."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes.nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": opset, MICROSOFT: 1},
            name="pos2d_decoder",
        )
        return ir.Model(graph, ir_version=ir_version, producer_name="pos2d")

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        name = tensor.name or ""
        if name not in self._initializers:
            self._initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
            )
        return self._initializers[name]
