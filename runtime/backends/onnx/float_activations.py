"""A quantised graph with float activations: the same weights, without the rounding of what they are multiplied with."""

from collections.abc import Collection
from pathlib import Path

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


def with_float_activations(path: Path, kinds: Collection[str]) -> bytes:
    """The graph at ``path`` with accuracy level 0 in the layers whose last part is one of ``kinds``."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits" and kinds_of(node.input[1]) & set(kinds):
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 0
    serialised: bytes = model.SerializeToString()
    return serialised


def kinds_of(weight: str) -> set[str]:
    """The kinds of layers that one weight of a graph is made of, by its name: ``….mlp.gate_up_proj.weight``."""
    module = weight.removesuffix(".weight").rpartition(".")[2]
    if module in ("embed_tokens", "lm_head"):
        return {"lm_head"}
    return {f"{stem}_proj" for stem in module.removesuffix("_proj").split("_")}
