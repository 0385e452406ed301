"""The interface of an ONNX artifact: its files, its graphs, and the names of their inputs, outputs and weights.

Exporter and runtime both take every name from here. ``docs/onnx-graph.md`` documents the same for other programs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from pos2d.config_values import ConfigValues, is_count
from pos2d.errors import InputError
from pos2d.families import Dimensions

# All graphs of an artifact share this weight file.
DATA_FILE = "model.onnx.data"

# The graph variants, from the cheapest to the most general; each can do what those before it do.
#   causal   one sequence without a mask: every token attends to all tokens before it
#   general  one sequence with any mask
#   batch    several sequences, each with a mask and a length of its own
#   genai    the graph of onnxruntime-genai, alone in its artifact: sequences without branches
GraphName = Literal["causal", "general", "batch", "genai"]
MOST_GENERAL: GraphName = "batch"
GENAI: GraphName = "genai"
GRAPH_FILES: Mapping[GraphName, str] = {
    "causal": "model_causal.onnx",
    "general": "model.onnx",
    "batch": "model_batch.onnx",
    "genai": "model.onnx",
}

# Inputs of every graph: token ids and positions int64 [batch, sequence]. Of all but genai: pos2d int64 [batch,
# sequence, 2] (branch and time), logits_rows int64 [batch, rows] (the tokens of this pass that get logits).
INPUT_IDS, POSITION_IDS, POS2D, LOGITS_ROWS = "input_ids", "position_ids", "pos2d", "logits_rows"
# Of causal and general: int32 [batch], the index of the last token. Of causal: int32 scalar, cached and new tokens.
SEQLENS_K, TOTAL_SEQUENCE_LENGTH = "seqlens_k", "total_sequence_length"
# Of general and batch: bool [batch, 1, sequence, cached and new tokens], True where attention is allowed. Of genai:
# int64 [batch, cached and new tokens], 1 for tokens and 0 for the padding after them.
ATTENTION_MASK = "attention_mask"
# Of batch: int64 [batch], the tokens that each sequence has in the cache.
CACHE_LENGTHS = "cache_lengths"
# Output: [batch, rows, vocab] in the type of the graph; of genai, a row for every token.
LOGITS = "logits"
# The KV cache of a layer: [batch, kv_heads, capacity, head_dim], bound as input and output over the same memory.
PAST_PREFIX, PRESENT_PREFIX = "past_key_values.", "present."
CACHE_PARTS = ("key", "value")

# Linear layers that read the same input are stored one under the other and computed as one product.
FUSED_LAYERS: Mapping[str, tuple[str, ...]] = {
    "self_attn": ("q_proj", "k_proj", "v_proj"),
    "mlp": ("gate_proj", "up_proj"),
}
EMBED_TOKENS, LM_HEAD = "embed_tokens", "lm_head"
# The last parts of the names of all linear layers.
LINEAR_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", LM_HEAD)


def past_name(layer: int, part: str) -> str:
    """The input that holds the cached keys or values (``part``) of a layer."""
    return f"{PAST_PREFIX}{layer}.{part}"


def present_name(layer: int, part: str) -> str:
    """The output that holds the keys or values of a layer after the pass."""
    return f"{PRESENT_PREFIX}{layer}.{part}"


def present_of(past: str) -> str:
    """The output that belongs to a cache input."""
    return past.replace(PAST_PREFIX, PRESENT_PREFIX, 1)


def fused_name(modules: Sequence[str]) -> str:
    """``….mlp.gate_up_proj`` of ``….mlp.gate_proj`` and ``….mlp.up_proj``; one module keeps its name."""
    block = modules[0].rpartition(".")[0]
    return f"{block}.{'_'.join(module.rpartition('.')[2].removesuffix('_proj') for module in modules)}_proj"


def kinds_of_weight(weight: str) -> set[str]:
    """The kinds of linear layers in one stored weight, by its name: ``….mlp.gate_up_proj.weight``."""
    module = weight.removesuffix(".weight").rpartition(".")[2]
    if module in (EMBED_TOKENS, LM_HEAD):
        return {LM_HEAD}
    return {f"{stem}_proj" for stem in module.removesuffix("_proj").split("_")}


@dataclass(frozen=True, slots=True)
class GraphTensor:
    """An input or output of a graph; ``dtype`` is numpy's name, and a dimension is a size or a name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class GraphFile:
    """One graph: its file, operator sets, number of nodes, inputs and outputs."""

    file: str
    opsets: Mapping[str, int]
    nodes: int
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]


@dataclass(frozen=True, slots=True)
class GraphInfo:
    """What a manifest says of an ONNX artifact: its file of weights, the model's sizes, and its graphs by name."""

    data: str
    sizes: Dimensions
    graphs: Mapping[GraphName, GraphFile]

    @property
    def files(self) -> set[str]:
        """The names of the graphs' files and of the weights."""
        return {self.data, *(graph.file for graph in self.graphs.values())}

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> "GraphInfo":
        """Inverse of :func:`dataclasses.asdict`.

        Raises:
            InputError: unknown or missing keys.
        """
        known = {field.name for field in fields(cls)}
        if set(block) != known:
            raise InputError(f"graph: keys {sorted(set(block) ^ known)} are missing or unknown")
        try:
            graphs = {name: _graph_file(facts) for name, facts in block["graphs"].items()}
            sizes = Dimensions.from_dict(block["sizes"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"graph: it cannot be read ({type(error).__name__}: {error})") from None
        known_graphs = set(get_args(GraphName))
        if set(graphs) != {GENAI} and (MOST_GENERAL not in graphs or not set(graphs) <= known_graphs - {GENAI}):
            others = [name for name in get_args(GraphName) if name != GENAI]
            raise InputError(f"graph: graphs has {', '.join(graphs) or 'none'}, not {', '.join(others)}, nor {GENAI}")
        return cls(ConfigValues(block, "graph").text("data"), sizes, graphs)


def _graph_file(facts: Mapping[str, Any]) -> GraphFile:
    inputs, outputs = (tuple(map(_graph_tensor, facts[side])) for side in ("inputs", "outputs"))
    values = ConfigValues(facts, "graph")
    opsets = values.block("opsets")
    versions = {domain: opsets.whole(domain) for domain in opsets.values}
    return GraphFile(
        file=values.text("file"), opsets=versions, nodes=values.whole("nodes"), inputs=inputs, outputs=outputs
    )


def _graph_tensor(facts: Mapping[str, Any]) -> GraphTensor:
    values = ConfigValues(facts, "graph")
    shape = tuple(facts["shape"])
    if not all(isinstance(size, str) or is_count(size) for size in shape):
        raise values.wrong("shape", "a list of sizes and names")
    return GraphTensor(values.text("name"), values.text("dtype"), shape)
