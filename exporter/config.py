"""What a merged directory says about itself to transformers."""

import json
from typing import Any

from exporter.base import Checkpoint, rope_settings
from pos2d.families import CLASS_NAMES, MODEL_TYPE_PREFIX
from pos2d.spec import Rope2DSpec


def baked_config(base: Checkpoint, spec: Rope2DSpec, dtype: str) -> dict[str, Any]:
    """The base's configuration in the form that every supported transformers reads, with our type and rope block."""
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
        "dtype": dtype,
        "rope_theta": theta,
        "rope_scaling": rope if rope["rope_type"] != "default" else None,
        "rope_2d": spec.to_dict(),
    }


def end_tokens(base: Checkpoint) -> tuple[int, ...]:
    """What ends a generation: the generation settings where they say it, else the configuration."""
    path = base.directory / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ends = settings.get("eos_token_id", base.config.get("eos_token_id"))
    if ends is None:
        return ()
    return tuple(ends) if isinstance(ends, list) else (int(ends),)
