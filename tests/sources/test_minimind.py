"""Files of ParallelMind's own architecture, as its scripts name and nest their tensors, are refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pos2d import exporter
from pos2d.errors import InputError
from pos2d.sources.adapters import read_adapters
from pos2d.sources.checkpoints.base import read_base
from pos2d.sources.checkpoints.checkpoint import Checkpoint
from pos2d.sources.checkpoints.minimind import VOCABULARY
from tests.bases import SHAPE, linear_modules, random_adapter, square, write_adapter, write_base

Content = dict[str, Any]
FPE = r"ParallelMind's --pe fpe"
CONVERT = "convert it to a Llama or Qwen3 model of transformers"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Of the dimensions of the files below, so that nothing but their content can be the reason of a refusal."""
    return read_base(write_base(tmp_path_factory.mktemp("base") / "base", LlamaConfig(**SHAPE)))


def state(more: Content | None = None, **sizes: int) -> Content:
    """The state dict of a dense model, in half precision with the head beside the embedding, and ``more`` tensors."""
    config = LlamaConfig(**SHAPE | sizes)  # whose names and shapes are theirs too
    return {name: tensor.half() for name, tensor in (LlamaForCausalLM(config).state_dict() | (more or {})).items()}


def pretrained(weights: Content) -> Content:
    return {"model_state_dict": weights, "tokenizer_path": "../model", "vocab_size": 300}


TABLE = {"model.fourier_pe.pe": torch.ones(512, 48)}
EXPERT = {"model.layers.1.mlp.experts.0.up_proj.weight": torch.ones(80, 48)}
LORA = random_adapter({"model.layers.0.self_attn.q_proj": (48, 48)})
RESUME = {"model": state(), "optimizer": {"state": {}, "param_groups": []}, "epoch": 0, "step": 9, "world_size": 1}
FILES: dict[str, tuple[Content, str]] = {
    "fine-tuned with fpe": (state(TABLE), rf"{FPE} \(tensor model\.fourier_pe\.pe\).*run it with ParallelMind"),
    "under the prefix of a wrapper": (state({"module.model.fourier_pe.pe": torch.ones(2, 48)}), FPE),
    "pretrained with fpe": (pretrained(state(TABLE)), FPE),
    "a table beside low-rank factors": (LORA | TABLE, FPE),
    "pretrained": (pretrained(state()), f"train_pretrain.py saves it; {CONVERT}"),
    "a mixture of experts": (state(EXPERT), "mixture of experts"),
    "a pretrained mixture of experts": (pretrained(state(EXPERT)), "mixture of experts"),
    "to resume from": (RESUME, "from which MiniMind resumes a training; give the weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files_of_its_own_architecture(base: Checkpoint, tmp_path: Path, case: str) -> None:
    content, sentence = FILES[case]
    (tmp_path / "out").mkdir()
    path = write_adapter(tmp_path / "out" / "full_sft_48.pth", content)
    for read in (
        lambda: read_adapters([path], base),
        lambda: exporter.inspect(path),
        lambda: read_base(path),
        lambda: read_base(path.parent),
    ):
        with pytest.raises(InputError, match=sentence) as caught:
            read()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_dense_model_is_known_by_its_vocabulary_where_it_does_not_fit(base: Checkpoint, tmp_path: Path) -> None:
    """Its names are Llama's, so a file that fits the base is its full fine-tune."""
    path = write_adapter(tmp_path / "full_sft.pth", state(vocab_size=VOCABULARY) | {"model.norm.weight": torch.ones(7)})
    sentence = f"has the vocabulary of the architecture of MiniMind and ParallelMind, .*{CONVERT}"
    with pytest.raises(InputError, match=f"does not fit .*; it {sentence}"):
        read_adapters([path], base)
    with pytest.raises(InputError, match=f"full_sft.pth {sentence}"):
        read_base(path)
    [adapter] = read_adapters([write_adapter(tmp_path / "fits.pth", state())], base)
    assert adapter.form == "state dict"
    [resized] = read_adapters([write_adapter(tmp_path / "resized.pth", state(vocab_size=VOCABULARY))], base)
    assert resized.vocab == VOCABULARY


def test_a_lora_over_such_a_model_is_a_lora(base: Checkpoint, tmp_path: Path) -> None:
    """Nothing in it tells how its base encodes branches."""
    factors = random_adapter(square(linear_modules(base.directory)))
    [adapter] = read_adapters([write_adapter(tmp_path / "lora.pth", factors)], base)
    assert adapter.form == "trainer"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, CONVERT),
        ({"use_moe": True}, "mixture of experts"),
        ({"pe_type": "fpe"}, FPE),
        ({"pe_type": "rope"}, CONVERT),
    ],
)
def test_directories_of_its_own_architecture(tmp_path: Path, settings: Content, sentence: str) -> None:
    config = SHAPE | {"model_type": "minimind", "rope_theta": 1e6, "pe_type": "rope", "use_moe": False} | settings
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))}.config.json: .*{sentence}"):
        read_base(tmp_path)
