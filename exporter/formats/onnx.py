"""A float32 ONNX decoder that takes ``pos2d``, with its KV cache; weights beside the graph in one file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.checkpoint import Checkpoint
from exporter.sources import Source
from pos2d.families import CLASS_NAMES
from pos2d.progress import Progress
from pos2d.spec import Rope2DSpec

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

GRAPH_FILE, DATA_FILE = "model.onnx", "model.onnx.data"


def write_onnx(source: Source, target: Path) -> dict[str, Any]:
    """Write graph and weights into ``target``; returns what a manifest says of the graph."""
    model = _build(source.base, source.spec)
    _save(model, target)
    return _describe(model)


def _build(checkpoint: Checkpoint, spec: Rope2DSpec) -> "ir.Model":
    from exporter.formats.graph import build_decoder

    inv_freq, scaling = _frequencies(checkpoint)
    return build_decoder(checkpoint.sizes, spec, inv_freq, scaling, lambda name: _lazy_tensor(checkpoint, name))


def _frequencies(checkpoint: Checkpoint) -> "tuple[np.ndarray, float]":
    """Inverse frequencies ``[F]`` and attention scaling, as the torch model computes them."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from pos2d.hf import configuration_pos2d

    config = getattr(configuration_pos2d, f"{CLASS_NAMES[checkpoint.sizes.family]}Config").from_pretrained(
        checkpoint.directory
    )
    rotary = LlamaRotaryEmbedding(config)  # the other families' class is the same code
    return rotary.inv_freq.numpy(), float(rotary.attention_scaling)


def _lazy_tensor(checkpoint: Checkpoint, name: str) -> "ir.LazyTensor":
    """A tensor that is read when the graph is written, and forgotten after."""
    import onnx_ir as ir
    from safetensors import safe_open

    place = checkpoint.tensors[name]

    def read() -> "ir.TensorProtocol":
        with safe_open(checkpoint.directory / place.file, framework="pt") as reader:
            return ir.tensor(reader.get_tensor(name).float().numpy(), name=name)

    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(place.shape), name=name)


def _save(model: "ir.Model", target: Path) -> None:
    import onnx_ir as ir

    weights = sum(1 for value in model.graph.initializers.values() if isinstance(value.const_value, ir.LazyTensor))
    with Progress("writing weights", weights) as progress:
        ir.save(
            model,
            target / GRAPH_FILE,
            external_data=DATA_FILE,
            size_threshold_bytes=1024,
            alignment=4096,
            callback=lambda _tensor, _info: progress.advance(),
        )


def _describe(model: "ir.Model") -> dict[str, Any]:
    """File names, opsets, number of nodes, every input and output with its type and shape (strings are named ones)."""

    def describe(value: "ir.Value") -> dict[str, Any]:
        dims = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ()]
        dtype = value.dtype.numpy().name if value.dtype is not None else "unknown"
        return {"name": value.name, "dtype": dtype, "shape": dims}

    return {
        "file": GRAPH_FILE,
        "data": DATA_FILE,
        "opsets": dict(model.opset_imports),
        "nodes": len(model.graph),
        "inputs": [describe(value) for value in model.graph.inputs],
        "outputs": [describe(value) for value in model.graph.outputs],
    }
