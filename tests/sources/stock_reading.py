"""What the installed transformers takes from a ``config.json``; run as a program, it prints that for many."""

import json
import sys
from pathlib import Path
from typing import Any

WINDOWED = ("qwen2", "qwen3")


def stock_reading(config: dict[str, Any]) -> dict[str, Any] | None:
    """The sizes, the window and the rotary frequencies; None where transformers cannot read the configuration."""
    from transformers import CONFIG_MAPPING
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    family = config["model_type"]
    try:
        read = CONFIG_MAPPING[family].from_dict(json.loads(json.dumps(config)))
        rotary = LlamaRotaryEmbedding(read)
    except Exception:
        return None
    slides = family == "mistral" or (family in WINDOWED and "sliding_attention" in read.layer_types)
    window = read.sliding_window if slides else None
    return {
        "hidden": read.hidden_size,
        "intermediate": read.intermediate_size,
        "layers": read.num_hidden_layers,
        "heads": read.num_attention_heads,
        "kv_heads": read.num_key_value_heads,
        "head_dim": getattr(read, "head_dim", None) or read.hidden_size // read.num_attention_heads,
        "vocab": read.vocab_size,
        "context_length": min(read.max_position_embeddings, window or read.max_position_embeddings),
        "norm_eps": read.rms_norm_eps,
        "tied": read.tie_word_embeddings,
        "output_bias": family in ("llama", "qwen3") and read.attention_bias,
        "mlp_bias": family == "llama" and read.mlp_bias,
        "act": read.hidden_act,
        "frequencies": rotary.inv_freq.double().tolist(),
        "scaling": float(rotary.attention_scaling),
    }


if __name__ == "__main__":
    import transformers

    transformers.logging.set_verbosity_error()
    configs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps({"version": transformers.__version__, "found": [stock_reading(config) for config in configs]}))
