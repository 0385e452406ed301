"""The decoder as an ONNX graph, node by node, over the checkpoint's own tensors.

One builder for Llama, Mistral, Qwen2 and Qwen3: they differ in biases and in a norm on queries and keys. Positions and
mask are inputs, so the graph holds no rule about branches; ``docs/onnx-graph.md`` documents them for other drivers.
"""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from pos2d.families import Dimensions
from pos2d.spec import Rope2DSpec

OPSETS = {"": 23, "com.microsoft": 1}
IR_VERSION = 11
MICROSOFT = "com.microsoft"
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64

Weights = Callable[[str], ir.TensorProtocol]
Attribute = int | float | ir.DataType


def build_decoder(
    sizes: Dimensions, spec: Rope2DSpec, inv_freq: np.ndarray, attention_scaling: float, weight: Weights
) -> ir.Model:
    """A float32 decoder with its KV cache as inputs and outputs.

    ``inv_freq`` is float32 ``[F]``; ``weight`` gives the tensor of a checkpoint name, linear weights as ``[out, in]``.
    """
    graph = _DecoderBuilder(sizes, weight)
    ids, positions, pos2d = graph.token_inputs()
    cos, sin = graph.rotary_tables(positions, pos2d, spec, inv_freq, attention_scaling)
    mask = graph.mask_input()

    hidden = graph.op("Gather", [graph.weight("model.embed_tokens.weight"), ids])
    normed = graph.norm(hidden, "model.layers.0.input_layernorm.weight")
    for number in range(sizes.layers):
        layer = f"model.layers.{number}"
        after = f"model.layers.{number + 1}.input_layernorm" if number + 1 < sizes.layers else "model.norm"
        mixed = graph.attention(normed, number, cos, sin, mask)
        normed, hidden = graph.add_and_norm(hidden, mixed, f"{layer}.post_attention_layernorm.weight")
        normed, hidden = graph.add_and_norm(hidden, graph.mlp(normed, f"{layer}.mlp"), f"{after}.weight")
    head = "model.embed_tokens.weight" if sizes.tied else "lm_head.weight"
    return graph.finish(graph.matmul(normed, head))


class _DecoderBuilder:
    """Collects nodes, inputs, outputs and initialisers; one method a part of the decoder."""

    def __init__(self, sizes: Dimensions, weight: Weights) -> None:
        self.sizes = sizes
        self.tape = Tape()
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.initializers: dict[str, ir.Value] = {}
        self._tensor = weight

    def op(self, kind: str, inputs: Sequence[ir.Value], domain: str = "", **attributes: Attribute) -> ir.Value:
        return self.tape.op(kind, inputs, attributes, domain=domain)

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, shape: Sequence[int | str]) -> None:
        value.name, value.type, value.shape = name, ir.TensorType(FLOAT), ir.Shape(shape)
        self.outputs.append(value)

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        name = tensor.name or ""
        if name not in self.initializers:
            self.initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
            )
        return self.initializers[name]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        return self.initializer(ir.tensor(array, name=name))

    def weight(self, name: str) -> ir.Value:
        return self.initializers[name] if name in self.initializers else self.initializer(self._tensor(name))

    def matmul(self, x: ir.Value, name: str) -> ir.Value:
        """``x @ W.T`` with the weight as the checkpoint stores it, ``[out, in]``."""
        return self.op("FusedMatMul", [x, self.weight(name)], MICROSOFT, transB=1)

    def linear(self, x: ir.Value, module: str, bias: bool) -> ir.Value:
        product = self.matmul(x, f"{module}.weight")
        return self.op("Add", [product, self.weight(f"{module}.bias")]) if bias else product

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        return self.op("RMSNormalization", [x, self.weight(name)], axis=-1, epsilon=self.sizes.norm_eps)

    def add_and_norm(self, hidden: ir.Value, update: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        """The norm of the sum, and the sum."""
        normed, _, _, total = self.tape.op_multi_out(
            "SkipSimplifiedLayerNormalization",
            [hidden, update, self.weight(name)],
            {"epsilon": self.sizes.norm_eps},
            num_outputs=4,
            domain=MICROSOFT,
        )
        return normed, total

    def token_inputs(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        return (
            self.input("input_ids", INT64, ["batch", "sequence"]),
            self.input("position_ids", INT64, ["batch", "sequence"]),
            self.input("pos2d", INT64, ["batch", "sequence", 2]),
        )

    def rotary_tables(
        self, positions: ir.Value, pos2d: ir.Value, spec: Rope2DSpec, inv_freq: np.ndarray, attention_scaling: float
    ) -> tuple[ir.Value, ir.Value]:
        """Cosine and sine ``[batch, sequence, F]``, made once and shared by every layer."""
        last = self.constant("last_axis", np.array([-1], dtype=np.int64))
        three = self.op("Concat", [self.op("Unsqueeze", [positions, last]), pos2d], axis=-1)
        axes = self.constant("rope_axes", np.array(spec.axes, dtype=np.int64))
        chosen = self.op("Cast", [self.op("Gather", [three, axes], axis=2)], to=FLOAT)
        angles = self.op("Mul", [chosen, self.constant("rope_inv_freq", inv_freq.astype(np.float32))])
        cos, sin = self.op("Cos", [angles]), self.op("Sin", [angles])
        if attention_scaling == 1.0:
            return cos, sin
        scaling = self.constant("rope_attention_scaling", np.array(attention_scaling, dtype=np.float32))
        return self.op("Mul", [cos, scaling]), self.op("Mul", [sin, scaling])

    def mask_input(self) -> ir.Value:
        return self.input("attention_mask", ir.DataType.BOOL, ["batch", 1, "sequence", "total"])

    def heads(self, x: ir.Value, module: str, norm: str, count: int, cos: ir.Value, sin: ir.Value) -> ir.Value:
        """Queries or keys ``[batch, sequence, count * head_dim]``, normed where the family does that, then rotated."""
        x = self.linear(x, module, self.sizes.qkv_bias)
        if self.sizes.qk_norm:
            split = self.constant(f"split_{count}", np.array([0, 0, count, self.sizes.head_dim], dtype=np.int64))
            joined = self.constant("join_heads", np.array([0, 0, -1], dtype=np.int64))
            x = self.op("Reshape", [self.norm(self.op("Reshape", [x, split]), norm), joined])
        return self.op("RotaryEmbedding", [x, cos, sin], num_heads=count)

    def attention(self, x: ir.Value, number: int, cos: ir.Value, sin: ir.Value, mask: ir.Value) -> ir.Value:
        sizes, module = self.sizes, f"model.layers.{number}.self_attn"
        queries = self.heads(x, f"{module}.q_proj", f"{module}.q_norm.weight", sizes.heads, cos, sin)
        keys = self.heads(x, f"{module}.k_proj", f"{module}.k_norm.weight", sizes.kv_heads, cos, sin)
        values = self.linear(x, f"{module}.v_proj", sizes.qkv_bias)
        past = [
            self.input(f"past_key_values.{number}.{kind}", FLOAT, ["batch", sizes.kv_heads, "past", sizes.head_dim])
            for kind in ("key", "value")
        ]
        # No is_causal: the mask alone decides, because in a step a token may see one that stands after it.
        mixed, *present = self.tape.op_multi_out(
            "Attention",
            [queries, keys, values, mask, *past],
            {"q_num_heads": sizes.heads, "kv_num_heads": sizes.kv_heads, "scale": sizes.head_dim**-0.5},
            num_outputs=3,
        )
        for kind, value in zip(("key", "value"), present, strict=True):
            self.output(value, f"present.{number}.{kind}", ["batch", sizes.kv_heads, "total", sizes.head_dim])
        return self.linear(mixed, f"{module}.o_proj", sizes.output_bias)

    def mlp(self, x: ir.Value, module: str) -> ir.Value:
        gate = self.linear(x, f"{module}.gate_proj", self.sizes.mlp_bias)
        swish = self.op("Mul", [gate, self.op("Sigmoid", [gate])])
        up = self.linear(x, f"{module}.up_proj", self.sizes.mlp_bias)
        return self.linear(self.op("Mul", [swish, up]), f"{module}.down_proj", self.sizes.mlp_bias)

    def finish(self, logits: ir.Value) -> ir.Model:
        self.output(logits, "logits", ["batch", "sequence", self.sizes.vocab])
        self.outputs.insert(0, self.outputs.pop())
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.tape.nodes,
            initializers=list(self.initializers.values()),
            opset_imports=OPSETS,
            name="pos2d_decoder",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="pos2d")
