"""``config.json`` of torch artifacts, as transformers reads it."""

from typing import TYPE_CHECKING, Any

from pos2d.errors import InputError
from pos2d.exporter.artifact.sidecars import GENERATION_SETTINGS, read_settings
from pos2d.exporter.inputs.base import rope_settings
from pos2d.exporter.inputs.checkpoint import Checkpoint
from pos2d.families import CLASS_NAMES, MODEL_TYPE_PREFIX
from pos2d.spec import Rope2DSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def baked_config(base: Checkpoint, spec: Rope2DSpec, dtype: str, tied: bool) -> dict[str, Any]:
    """The base's configuration, as every supported transformers reads it, with our ``model_type`` and ``rope_2d``."""
    config = {
        key: value
        for key, value in base.config.items()
        if key not in ("rope_parameters", "torch_dtype", "_name_or_path")
    }
    rope = rope_settings(base.config)
    theta = rope.pop("rope_theta")
    class_name = CLASS_NAMES[base.sizes.family]
    return config | {
        "model_type": MODEL_TYPE_PREFIX + base.sizes.family,
        "architectures": [f"{class_name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_pos2d.{class_name}Config",
            "AutoModel": f"modeling_pos2d.{class_name}Model",
            "AutoModelForCausalLM": f"modeling_pos2d.{class_name}ForCausalLM",
        },
        "head_dim": base.sizes.head_dim,
        "tie_word_embeddings": tied,
        "dtype": dtype,
        "rope_theta": theta,
        "rope_scaling": rope if rope["rope_type"] != "default" else None,
        "rope_2d": spec.to_dict(),
    }


def model_config(base: Checkpoint, spec: Rope2DSpec, tied: bool) -> "PretrainedConfig":
    """The configuration object of the merged model in float32."""
    from pos2d.hf import configuration_pos2d

    kind = getattr(configuration_pos2d, f"{CLASS_NAMES[base.sizes.family]}Config")
    config: PretrainedConfig = kind.from_dict(baked_config(base, spec, "float32", tied))
    return config


def end_tokens(base: Checkpoint) -> tuple[int, ...]:
    """Ids of the EOS tokens: from the generation settings, or from the configuration if those have none.

    Raises:
        InputError: values that are not token ids.
    """
    path = base.directory / GENERATION_SETTINGS
    settings = read_settings(path) if path.is_file() else {}
    stored = settings.get("eos_token_id", base.config.get("eos_token_id"))
    tokens = [] if stored is None else stored if isinstance(stored, list) else [stored]
    if not all(isinstance(token, int) for token in tokens):
        raise InputError(f"{base.directory}: eos_token_id is {stored!r}, not token ids; correct it in {path.name}")
    return tuple(tokens)
