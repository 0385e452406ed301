"""Configurations of the size of public models, for random weights."""

import json
from pathlib import Path
from typing import Any

from pos2d.families import Dimensions

SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {  # Qwen2.5-0.5B
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {  # Qwen2.5-7B
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
COMMON = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "dtype": "bfloat16",
    "eos_token_id": 2,
}


def write_config(directory: Path, shape: dict[str, Any]) -> Dimensions:
    """Write ``config.json`` of a ``shape``; returns its sizes."""
    config = COMMON | shape
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return Dimensions.from_config(config, "config.json")
