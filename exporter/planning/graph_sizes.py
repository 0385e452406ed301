"""The sizes of a decoder, read back from its ONNX graph: the weights keep the names of the checkpoint."""

from pathlib import Path

from pos2d.errors import InputError
from pos2d.families import Dimensions
from pos2d.manifest import Manifest


def graph_sizes(directory: Path, manifest: Manifest) -> Dimensions:
    """Only the graph's own file is read, not its weights; it does not tell ``norm_eps``, which is 0 here.

    Raises:
        InputError: a graph that cannot be read or is not one of this tool's.
    """
    import onnx

    graph = manifest.graph or {}
    path = directory / str(graph.get("file"))
    try:
        model = onnx.load(path, load_external_data=False)
        shapes = {weight.name: tuple(weight.dims) for weight in model.graph.initializer}
        keys = [entry["shape"] for entry in graph["inputs"] if entry["name"].endswith(".key")]
        _, kv_heads, _, head_dim = keys[0]
        vocab, hidden = shapes["model.embed_tokens.weight"]
        attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
        return Dimensions(
            family=manifest.family,
            hidden=hidden,
            intermediate=shapes[f"{mlp}.gate_proj.weight"][0],
            layers=len(keys),
            heads=shapes[f"{attention}.q_proj.weight"][0] // head_dim,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=vocab,
            context_length=manifest.context_length,
            norm_eps=0.0,
            tied="lm_head.weight" not in shapes,
            qkv_bias=f"{attention}.q_proj.bias" in shapes,
            output_bias=f"{attention}.o_proj.bias" in shapes,
            mlp_bias=f"{mlp}.gate_proj.bias" in shapes,
            qk_norm=f"{attention}.q_norm.weight" in shapes,
        )
    except Exception as error:  # protobuf raises a class of its own, and what follows is as wrong as the file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} cannot be read as a graph of this tool: {reason}; export it again") from None
