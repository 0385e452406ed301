"""``config.json`` of torch artifacts, as transformers reads it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pos2d.errors import InputError
from pos2d.families import CLASS_NAMES, CLASS_PREFIX, DEFAULTS, MODEL_TYPE_PREFIX
from pos2d.sources.checkpoints.checkpoint import Checkpoint
from pos2d.sources.checkpoints.other_keys import LEFT_OUT, other_keys, token_ids
from pos2d.sources.checkpoints.rope import rope_settings
from pos2d.sources.checkpoints.weight_files import CONFIG
from pos2d.sources.sidecars.sidecars import GENERATION_SETTINGS, read_settings
from pos2d.sources.stock_rope import one_branch_rope, scale_keys
from pos2d.spec import Rope2DSpec

if TYPE_CHECKING:
    import numpy as np
    from transformers import PretrainedConfig


# Rope settings go into the keys that both releases of transformers read; the others belong to the base's files.
DROPPED = (
    "rope_parameters",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "torch_dtype",
    "_name_or_path",
    "transformers_weights",
    "quantization_config",
    "compression_config",
    "quantization",
    "auto_map",
    "rope_2d",
)
# Llama has no window, but the caches of transformers take one from any configuration.
WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "attention_chunk_size")


def artifact_config(base: Checkpoint, spec: Rope2DSpec, dtype: str, tied: bool) -> dict[str, Any]:
    """The configuration of a torch artifact: with our classes if it has 2D RoPE, or else of the base's own."""
    return baked_config(base, spec, dtype, tied) if spec.is_2d else plain_config(base, dtype, tied)


def baked_config(base: Checkpoint, spec: Rope2DSpec, dtype: str, tied: bool) -> dict[str, Any]:
    """The configuration of our classes: our ``model_type``, the code that has them, and ``rope_2d``."""
    class_name = CLASS_NAMES[base.sizes.family]
    return plain_config(base, dtype, tied) | {
        "model_type": MODEL_TYPE_PREFIX + base.sizes.family,
        "architectures": [f"{class_name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_pos2d.{class_name}Config",
            "AutoModel": f"modeling_pos2d.{class_name}Model",
            "AutoModelForCausalLM": f"modeling_pos2d.{class_name}ForCausalLM",
        },
        "rope_2d": spec.to_dict(),
    }


def plain_config(base: Checkpoint, dtype: str, tied: bool) -> dict[str, Any]:
    """The base's configuration, as every supported transformers reads it."""
    config = {
        key: value
        for key, value in base.config.items()
        if key not in (*DROPPED, *LEFT_OUT) and not (base.sizes.family == "llama" and key in WINDOW_KEYS)
    }
    rope = rope_settings(base.config, str(base.directory / CONFIG))
    theta = rope.pop("rope_theta")
    sizes = base.sizes
    others = other_keys(base.config, str(base.directory / CONFIG), sizes.vocab)
    return (
        config
        | others
        | {
            "model_type": base.sizes.family,
            "architectures": [f"{CLASS_NAMES[base.sizes.family].removeprefix(CLASS_PREFIX)}ForCausalLM"],
            "vocab_size": sizes.vocab,
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.intermediate,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "head_dim": sizes.head_dim,
            "rms_norm_eps": sizes.norm_eps,
            "tie_word_embeddings": tied,
            "dtype": dtype,
            "rope_theta": theta,
            "rope_scaling": rope | scale_keys(rope) if rope["rope_type"] != "default" else None,
        }
    )


def stock_config(base: Checkpoint, spec: Rope2DSpec, dtype: str, tied: bool) -> dict[str, Any]:
    """The configuration of the base's own classes, which of a model with 2D RoPE compute one branch."""
    config = plain_config(base, dtype, tied)
    if not spec.is_2d:
        return config
    length = base.config.get("max_position_embeddings", DEFAULTS[base.sizes.family]["max_position_embeddings"])
    rope = one_branch_rope(*rotary_frequencies(base, spec, tied), config["rope_theta"], length, spec)
    return config | {"max_position_embeddings": length, "rope_scaling": rope}


def rotary_frequencies(base: Checkpoint, spec: Rope2DSpec, tied: bool) -> "tuple[np.ndarray, float]":
    """Inverse frequencies, float32 ``[F]``, and the factor of cosines and sines, both as the torch model has them."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    # The classes of the other families have the same code.
    rotary = LlamaRotaryEmbedding(model_config(base, spec, tied))
    return rotary.inv_freq.numpy(), float(rotary.attention_scaling)


def model_config(base: Checkpoint, spec: Rope2DSpec, tied: bool) -> "PretrainedConfig":
    """The configuration object of the merged model in float32.

    Raises:
        InputError: transformers cannot read it.
    """
    from pos2d.hf import configuration_pos2d

    kind = getattr(configuration_pos2d, f"{CLASS_NAMES[base.sizes.family]}Config")
    settings = baked_config(base, spec, "float32", tied)
    try:
        config: PretrainedConfig = kind.from_dict(settings)
    except Exception as error:  # classes of transformers check further keys, each in its own way
        reason = " ".join(str(error).split())
        raise InputError(f"{base.directory / CONFIG} cannot be read by transformers: {reason}; correct it") from None
    return config


def end_tokens(base: Checkpoint, generation: Path | None = None) -> tuple[int, ...]:
    """Ids of the EOS tokens: from the generation settings, or from the configuration if those have none.

    ``generation``: the file of these settings, where they are not those of the base.

    Raises:
        InputError: values that are not token ids.
    """
    path = generation or base.directory / GENERATION_SETTINGS
    settings = read_settings(path) if path.is_file() else {}
    tokens = token_ids(base.config.get("eos_token_id"), str(base.directory / CONFIG))
    if "eos_token_id" in settings:
        tokens = token_ids(settings["eos_token_id"], str(path))
    # A model never writes a token outside its vocabulary, so such an id, often -1, ends nothing.
    return tuple(token for token in tokens if 0 <= token < base.sizes.vocab)
