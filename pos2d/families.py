"""The supported decoder families, and the dimensions that their configurations give."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pos2d.errors import InputError

MODEL_TYPE_PREFIX = "pos2d_"
CLASS_NAMES = {"llama": "Pos2DLlama", "mistral": "Pos2DMistral", "qwen2": "Pos2DQwen2", "qwen3": "Pos2DQwen3"}
DEFAULT_HEAD_DIM = {"qwen3": 128}


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The dimensions of one decoder, from its ``config.json``."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context_length: int
    norm_eps: float
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @property
    def num_frequencies(self) -> int:
        return self.head_dim // 2

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> "Dimensions":
        """Read the dimensions; ``source`` names the file in errors.

        Raises:
            InputError: a missing key or an activation other than SiLU.
        """
        family = str(config["model_type"]).removeprefix(MODEL_TYPE_PREFIX)
        attention_bias = bool(config.get("attention_bias", False))
        try:
            heads = config["num_attention_heads"]
            head_dim = config.get("head_dim") or DEFAULT_HEAD_DIM.get(family) or config["hidden_size"] // heads
            sizes = cls(
                family=family,
                hidden=config["hidden_size"],
                intermediate=config["intermediate_size"],
                layers=config["num_hidden_layers"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=head_dim,
                vocab=config["vocab_size"],
                context_length=_context_length(config, family),
                norm_eps=config.get("rms_norm_eps", 1e-6),
                tied=bool(config.get("tie_word_embeddings", False)),
                qkv_bias=family == "qwen2" or attention_bias,
                output_bias=family != "qwen2" and attention_bias,
                mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
                qk_norm=family == "qwen3",
            )
        except KeyError as missing:
            raise InputError(f"{source}: key {missing} is missing") from None
        if config.get("hidden_act", "silu") != "silu":
            raise InputError(f"{source}: hidden_act {config['hidden_act']!r} is not supported; these families use silu")
        return sizes


def _context_length(config: Mapping[str, Any], family: str) -> int:
    """Number of positions that the model supports; a sliding window limits it, because columns have no window."""
    limit = int(config["max_position_embeddings"])
    slides = family == "mistral" or (family.startswith("qwen") and config.get("use_sliding_window", False))
    window = config.get("sliding_window") if slides else None
    return min(limit, int(window)) if window else limit


def expected_tensors(sizes: Dimensions) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint with these dimensions; a tied head is not among them."""
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    linears = {
        "self_attn.q_proj": (queries, sizes.hidden, sizes.qkv_bias),
        "self_attn.k_proj": (keys, sizes.hidden, sizes.qkv_bias),
        "self_attn.v_proj": (keys, sizes.hidden, sizes.qkv_bias),
        "self_attn.o_proj": (sizes.hidden, queries, sizes.output_bias),
        "mlp.gate_proj": (sizes.intermediate, sizes.hidden, sizes.mlp_bias),
        "mlp.up_proj": (sizes.intermediate, sizes.hidden, sizes.mlp_bias),
        "mlp.down_proj": (sizes.hidden, sizes.intermediate, sizes.mlp_bias),
    }
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (sizes.hidden,),
        "post_attention_layernorm.weight": (sizes.hidden,),
    }
    for name, (rows, columns, bias) in linears.items():
        layer[f"{name}.weight"] = (rows, columns)
        if bias:
            layer[f"{name}.bias"] = (rows,)
    if sizes.qk_norm:
        layer |= {"self_attn.q_norm.weight": (sizes.head_dim,), "self_attn.k_norm.weight": (sizes.head_dim,)}

    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes.vocab, sizes.hidden)}
    for number in range(sizes.layers):
        names |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    names["model.norm.weight"] = (sizes.hidden,)
    if not sizes.tied:
        names["lm_head.weight"] = (sizes.vocab, sizes.hidden)
    return names
