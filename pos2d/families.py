"""The supported decoder families, and the dimensions that their configurations give."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from pos2d.config_values import MAX_COUNT, ConfigValues
from pos2d.errors import InputError

MODEL_TYPE_PREFIX, CLASS_PREFIX = "pos2d_", "Pos2D"
CLASS_NAMES = {"llama": "Pos2DLlama", "mistral": "Pos2DMistral", "qwen2": "Pos2DQwen2", "qwen3": "Pos2DQwen3"}
# What transformers, 4.57 and 5 alike, takes for a key that config.json leaves out.
_QWEN = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
}
DEFAULT_NORM_EPS = 1e-6
DEFAULT_WINDOW = 4096
DEFAULT_MAX_WINDOW_LAYERS = 28
# Names of one function.
SILU = ("silu", "swish")
MAX_LAYERS = 10_000
SLIDING, FULL = "sliding_attention", "full_attention"


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
        """Read the dimensions, as transformers does; ``source`` names the file in errors.

        Raises:
            InputError: a value of another type or out of range, heads that do not divide, an unknown architecture, or
                an activation other than SiLU.
        """
        values = ConfigValues(config, source)
        family = str(values.text("model_type")).removeprefix(MODEL_TYPE_PREFIX)
        if family not in DEFAULTS:
            raise InputError(f"{source}: unknown architecture {family!r}; supported are {', '.join(DEFAULTS)}")
        defaults = DEFAULTS[family]
        if values.text("hidden_act", SILU[0]) not in SILU:
            raise InputError(f"{source}: hidden_act {config['hidden_act']!r} is not supported; these families use silu")
        layers = values.whole("num_hidden_layers", defaults["num_hidden_layers"], 1, MAX_LAYERS)
        heads, kv_heads, head_dim = _heads(values, family)
        # Mistral has no biases, whatever its configuration says, and Qwen2 always has the same three.
        attention_bias = family in ("llama", "qwen3") and values.switch("attention_bias", False)
        return cls(
            family=family,
            hidden=values.whole("hidden_size", defaults["hidden_size"], 1),
            intermediate=values.whole("intermediate_size", defaults["intermediate_size"], 1),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=values.whole("vocab_size", defaults["vocab_size"], 1),
            context_length=_context_length(values, family, layers),
            norm_eps=float(values.number("rms_norm_eps", DEFAULT_NORM_EPS)),
            tied=values.switch("tie_word_embeddings", False),
            qkv_bias=family == "qwen2" or attention_bias,
            output_bias=attention_bias,
            mlp_bias=family == "llama" and values.switch("mlp_bias", False),
            qk_norm=family == "qwen3",
        )

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> "Dimensions":
        """Inverse of :func:`dataclasses.asdict`.

        Raises:
            InputError: unknown or missing keys, or values of other types.
        """
        values = ConfigValues(block, "sizes")
        readers: Mapping[Any, Callable[[str], Any]] = {
            str: values.text,
            bool: values.switch,
            float: values.number,
            int: lambda name: values.whole(name, minimum=1, maximum=MAX_LAYERS if name == "layers" else MAX_COUNT),
        }
        known = {field.name: readers[field.type] for field in fields(cls)}
        if set(block) != set(known):
            raise InputError(f"sizes: keys {sorted(set(block) ^ set(known))} are missing or unknown")
        if values.text("family") not in DEFAULTS:
            raise values.wrong("family", f"one of {', '.join(DEFAULTS)}")
        return cls(**{name: read(name) for name, read in known.items()})


def _heads(values: ConfigValues, family: str) -> tuple[int, int, int]:
    """The numbers of heads and of those for keys and values, and the size of a head."""
    defaults = DEFAULTS[family]
    hidden: int = values.whole("hidden_size", defaults["hidden_size"], 1)
    heads: int = values.whole("num_attention_heads", defaults["num_attention_heads"], 1)
    kv_heads: int = heads
    if values.has("num_key_value_heads") or "num_key_value_heads" not in values.values:
        kv_heads = values.whole("num_key_value_heads", defaults.get("num_key_value_heads", heads), 1)
    if heads % kv_heads:
        raise values.wrong("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    head_dim: int | None = values.whole("head_dim", defaults.get("head_dim"), 1)
    if (head_dim is None or family == "llama") and hidden % heads:
        raise values.wrong("hidden_size", f"a multiple of num_attention_heads, {heads}")
    head_dim = head_dim or hidden // heads
    if head_dim % 2:
        raise values.wrong("head_dim" if values.has("head_dim") else "hidden_size", "such that heads have an even size")
    return heads, kv_heads, head_dim


def _context_length(values: ConfigValues, family: str, layers: int) -> int:
    """Number of positions that the model supports; a sliding window limits it, because columns have no window."""
    limit: int = values.whole("max_position_embeddings", DEFAULTS[family]["max_position_embeddings"], 1)
    window = _window(values, family, layers)
    return min(limit, window) if window else limit


def _window(values: ConfigValues, family: str, layers: int) -> int | None:
    """The number of positions that a layer sees, or None if every layer sees all.

    Mistral has a window in every layer, Qwen in those that ``layer_types`` names, or the later ones, Llama nowhere.
    """
    if family == "llama":
        return None
    window: int | None = None
    if values.has("sliding_window") or "sliding_window" not in values.values:
        window = values.whole("sliding_window", DEFAULT_WINDOW, 1)
    if family == "mistral":
        return window
    window = window if values.switch("use_sliding_window", False) else None
    first: int = values.whole("max_window_layers", DEFAULT_MAX_WINDOW_LAYERS)
    kinds = values.texts("layer_types", None)
    if kinds is None:
        return window if first < layers else None
    if len(kinds) != layers or not set(kinds) <= {SLIDING, FULL}:
        raise values.wrong("layer_types", f"{layers} times {FULL} or {SLIDING}, as there are layers")
    if SLIDING in kinds and window is None:
        raise values.wrong("layer_types", f"without {SLIDING} where use_sliding_window and sliding_window are not set")
    return window if SLIDING in kinds else None


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
