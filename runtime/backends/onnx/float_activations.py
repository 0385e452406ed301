"""A quantised graph with float activations: the same weights, but the inputs of a layer are not rounded to 8 bits."""

from collections.abc import Collection
from pathlib import Path

from pos2d.onnx_io import kinds_of_weight


def with_float_activations(path: Path, kinds: Collection[str], weights: str) -> bytes:
    """The serialised graph at ``path`` with accuracy level 0 in the layers of ``kinds``, such as ``down_proj``.

    ``weights`` is the name of the file that has its weights.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits" and kinds_of_weight(node.input[1]) & set(kinds):
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 0
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = weights
    serialised: bytes = model.SerializeToString()
    return serialised
