"""A GGUF file of a stock Llama or Qwen2 directory, rounded by llama.cpp itself. For the peers' python.

Without ``--tokenizer`` it has none: benchmarks/peers.py speaks in token ids.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from safetensors import safe_open

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
TYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def write_float32(plain: Path, out: Path, tokenizer: Path | None = None) -> None:
    """All weights in float32, one in memory at a time, with the tokenizer of another GGUF file."""
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    arch = ARCHITECTURES[config["model_type"]]
    if rope_settings(config).get("rope_type", "default") != "default":
        raise SystemExit(f"{plain}: rope_scaling is not carried over to GGUF")
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[arch])
    add_settings(writer, config)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        add_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, tensor in tensors(plain):
        renamed = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor_info(renamed, tensor.get_shape(), np.dtype(np.float32), 4 * int(np.prod(tensor.get_shape())))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors(plain):
        writer.write_tensor_data(permuted(name, tensor[:].float().numpy(), config))
    writer.close()


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Type, theta and scaling: one block in a configuration of transformers 5, several keys in one of 4."""
    scaling = dict(config.get("rope_scaling") or {})
    if "type" in scaling:
        scaling["rope_type"] = scaling.pop("type")
    return {"rope_theta": config.get("rope_theta", 10000.0)} | scaling | (config.get("rope_parameters") or {})


def add_settings(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(rope_settings(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def add_tokenizer(writer: Any, source: Path) -> None:
    """Everything that a GGUF file of the same vocabulary says of its tokenizer."""
    for name, field in gguf.GGUFReader(source).fields.items():
        if name.startswith("tokenizer."):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)


def tensors(plain: Path) -> Iterator[tuple[str, Any]]:
    """Names and slices, not read yet, in an order that stays the same."""
    for file in sorted(plain.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in sorted(opened.keys()):
                yield name, opened.get_slice(name)


def permuted(name: str, array: Any, config: dict[str, Any]) -> Any:
    """Llama turns neighbouring dimensions together in GGUF, and the two halves of a head in safetensors."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    projection = name.split(".")[-2]
    if config["model_type"] != "llama" or projection not in heads:
        return array
    shape = (config[heads[projection]], 2, -1, *array.shape[1:])
    return np.ascontiguousarray(array.reshape(shape).swapaxes(1, 2).reshape(array.shape))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("plain", type=Path)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("type", choices=TYPES)
    arguments.add_argument("--tokenizer", type=Path, help="A GGUF file whose tokenizer is taken.")
    given = arguments.parse_args()
    full = given.out.with_suffix(".f32")
    try:
        write_float32(given.plain, full, given.tokenizer)
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = TYPES[given.type]
        if llama_cpp.llama_model_quantize(bytes(full), bytes(given.out), settings) != 0:
            raise SystemExit(f"llama.cpp does not quantise {full}")
    finally:
        full.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
