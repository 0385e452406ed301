"""Random bases of the sizes of public models, and adapters for them in both forms."""

import json
from pathlib import Path
from typing import Any

from pos2d.families import Dimensions, expected_tensors

RANK = 16
TOUCHED = ("q_proj.weight", "o_proj.weight")
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


def make_inputs(place: Path, shape: dict[str, Any]) -> tuple[int, int]:
    """A sharded base, and the adapter in both forms; returns bytes: the base's, and its largest touched tensor's."""
    import torch
    from safetensors.torch import save_file

    base, peft = place / "base", place / "peft"
    base.mkdir()
    peft.mkdir()
    shapes = expected_tensors(write_config(base, shape))
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 24, generator=draw).mul_(0.02).bfloat16()

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        start = int(torch.randint(1 << 20, (), generator=draw))
        return noise.roll(start).repeat(count // len(noise) + 1)[:count].reshape(shape).clone()

    save_in_shards(base, shapes, random)
    touched = {name: shape for name, shape in shapes.items() if name.endswith(TOUCHED)}
    lora: dict[str, torch.Tensor] = {}
    for name, (rows, columns) in touched.items():
        module = name.removesuffix(".weight")
        lora |= {f"{module}.lora.A.weight": random((RANK, columns)), f"{module}.lora.B.weight": random((rows, RANK))}
    torch.save(lora, place / "lora.pth")
    renamed = {f"base_model.model.{n}".replace(".lora.", ".lora_"): tensor for n, tensor in lora.items()}
    save_file(renamed, peft / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK}
    settings |= {"target_modules": ["q_proj", "o_proj"], "base_model_name_or_path": str(base)}
    (peft / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    size = sum(file.stat().st_size for file in base.iterdir())
    return size, max(2 * torch.Size(shape).numel() for shape in touched.values())


def save_in_shards(base: Path, shapes: dict[str, tuple[int, ...]], random: Any, limit: int = 4_000_000_000) -> None:
    """The tensors in files of at most ``limit`` bytes, one in memory at a time."""
    from safetensors.torch import save_file

    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = 2
        for length in shape:
            nbytes *= length
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        save_file({name: random(shapes[name]) for name in names}, base / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(groups) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
