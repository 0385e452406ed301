"""Tiny random bases of every family, adapters for them, and a tokenizer of single bytes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

Shape = tuple[int, int]
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "initializer_range": 0.3,
    "rms_norm_eps": 0.01,
}
# Qwen2.5-0.5B.
HALF_BILLION = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama with llama3 rope": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
    "llama with yarn rope": LlamaConfig(**SHAPE, rope_parameters=YARN),
    "mistral with wide heads": MistralConfig(**SHAPE, head_dim=16, sliding_window=None),
    "qwen2 with linear rope": Qwen2Config(**SHAPE, rope_parameters=LINEAR, tie_word_embeddings=True),
    "qwen3 with wide heads": Qwen3Config(**SHAPE, head_dim=24),
    "qwen3 with biases": Qwen3Config(**SHAPE, head_dim=12, attention_bias=True),
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_base(directory: Path, config: PretrainedConfig, *, seed: int = 0, **settings: Any) -> Path:
    """A random float32 checkpoint; every bias and norm random too, so that none can be dropped unseen."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory, **settings)
    return directory


def linear_modules(base: Path) -> dict[str, Shape]:
    """Name and ``(out, in)`` of every linear layer of the decoder (the head, which the trainer may tie, left out)."""
    model = AutoModelForCausalLM.from_pretrained(base)
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def random_adapter(modules: dict[str, Shape], rank: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    """The trainer's dictionary with random factors for ``modules``."""
    draw = torch.Generator().manual_seed(seed)
    adapter: dict[str, torch.Tensor] = {}
    for name, (rows, columns) in modules.items():
        adapter[f"{name}.lora.A.weight"] = torch.randn(rank, columns, generator=draw) * 0.1
        adapter[f"{name}.lora.B.weight"] = torch.randn(rows, rank, generator=draw) * 0.1
    return adapter


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory's safetensors files."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def square(modules: dict[str, Shape]) -> dict[str, Shape]:
    return {name: shape for name, shape in modules.items() if shape[0] == shape[1]}


def write_adapter(path: Path, adapter: dict[str, torch.Tensor]) -> Path:
    torch.save(adapter, path)
    return path


def write_tokenizer(directory: Path, *, chat: bool = False, special: Sequence[str] = ()) -> None:
    """One token a byte; ids 0 to 255 follow the byte alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"chat_template": CHAT_TEMPLATE} if chat else {})
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
