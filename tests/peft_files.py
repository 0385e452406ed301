"""Small PEFT directories written by hand, to be spoilt."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from pos2d.errors import InputError
from pos2d.sources.adapters.peft import read_peft
from pos2d.sources.checkpoints.checkpoint import Checkpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q, PREFIX = "model.layers.0.self_attn.q_proj", "base_model.model."
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
VOCAB, HIDDEN, RANK = 300, 48, 4
Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors], None]


def write_peft(path: Path, *edits: Edit, **settings: Any) -> Path:
    """A good adapter of ``q_proj`` with ``settings`` in its configuration and ``edits`` made to its tensors."""
    LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules=["q_proj"]).save_pretrained(str(path))
    config = json.loads((path / CONFIG).read_text(encoding="utf-8")) | settings
    (path / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    tensors: Tensors = {}
    for name in (Q, Q.replace("0", "1")):
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.ones(RANK, HIDDEN)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.ones(HIDDEN, RANK)
    for edit in edits:
        edit(tensors)
    save_file(tensors, path / WEIGHTS)
    return path


def add(*names: str, shape: tuple[int, ...]) -> Edit:
    """Random tensors, each another, for ``names``; one that is there already is replaced."""

    def edit(tensors: Tensors) -> None:
        for name in names:
            draw = torch.Generator().manual_seed(len(name))
            tensors[PREFIX + name] = torch.randn(shape, generator=draw)

    return edit


def drop(*names: str) -> Edit:
    def edit(tensors: Tensors) -> None:
        for name in names:
            del tensors[PREFIX + name]

    return edit


def refusal(path: Path, base: Checkpoint, *edits: Edit, **settings: Any) -> str:
    """The sentence with which the spoilt adapter is refused."""
    with pytest.raises(InputError) as caught:
        read_peft(write_peft(path, *edits, **settings), base)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    return sentence
