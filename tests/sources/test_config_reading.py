"""What is taken from a configuration, and from a directory of several files, held against both transformers."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from pos2d import exporter, runtime
from pos2d.errors import InputError
from pos2d.families import CLASS_NAMES, Dimensions
from pos2d.sources.checkpoints.checkpoint import Checkpoint
from pos2d.sources.checkpoints.rope import rope_settings
from pos2d.sources.hf_config import model_config
from pos2d.spec import Rope2DSpec
from tests.bases import SHAPE, linear_modules, random_adapter, weights, write_adapter, write_base
from tests.bounds import logits_bound
from tests.runtime.test_transformers_loading import in_transformers
from tests.sources import stock_reading

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 9000,
    "rms_norm_eps": 1e-5,
}
OWN_KEYS: tuple[dict[str, Any], ...] = (
    {"attention_bias": True},
    {"mlp_bias": True},
    {"tie_word_embeddings": True},
    {"num_key_value_heads": None},
    {"head_dim": None},
    {"hidden_act": "swish"},
    {"sliding_window": 100},
    {"sliding_window": None},
    {"use_sliding_window": True},
    {"use_sliding_window": True, "sliding_window": None},
    {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 50},
    {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 50},
    {"use_sliding_window": True, "sliding_window": 50, "layer_types": ["full_attention"] * 3},
    {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    {"rope_theta": 5e5},
)
LONGROPE = {
    "rope_type": "longrope",
    "factor": 1.0,
    "short_factor": [1.5] * 7 + [1e30],
    "long_factor": [1.5] * 7 + [1e30],
}
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Rope settings in several places, and in the forms of several releases.
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_theta": 5e5, "rope_scaling": LINEAR},
    {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 3.0}},
    {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 3.0}},
    {"rope_scaling": LINEAR | {"rope_theta": 7e4}},
    {"rope_theta": 7e4, "rope_scaling": LINEAR | {"rope_theta": 7e4}},
    {"rope_parameters": YARN | {"rope_theta": 7e4}},
    {"rope_parameters": YARN, "rope_theta": 7e4},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}, "rope_theta": 7e4},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}, "rope_theta": 8e4},
    {"rope_parameters": {"rope_theta": 7e4}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}, "rope_scaling": LINEAR},
    {"rope_parameters": YARN | {"rope_theta": 7e4}, "rope_scaling": {}},
    {"rope_scaling": YARN | {"attention_factor": 1.5, "beta_fast": 16.0}, "rope_theta": 1e6},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    {"rope_scaling": YARN, "original_max_position_embeddings": 700},
    {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 512}},
    {"rope_parameters": LLAMA3 | {"rope_theta": 1e4}},
    {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
    {"rope_scaling": LONGROPE, "rope_theta": 7e4},
    {"rope_scaling": LONGROPE | {"factor": 3.0}},
    {"rope_scaling": LONGROPE | {"factor": None}},
    {"rope_scaling": LONGROPE | {"attention_factor": 1.2, "factor": None}},
    {"rope_scaling": LONGROPE | {"original_max_position_embeddings": 3000}},
    {"rope_scaling": LONGROPE | {"factor": 3.0, "original_max_position_embeddings": 3000}},
    {"rope_scaling": LONGROPE | {"factor": None}, "original_max_position_embeddings": 3000},
    {"rope_scaling": LONGROPE | {"factor": 3.0}, "original_max_position_embeddings": 3000},
    {"rope_scaling": LONGROPE | {"factor": 2.0}, "original_max_position_embeddings": 3000},
    {"rope_scaling": LONGROPE | {"long_factor": [1.5] * 7 + [1e30]}},
    {"rope_scaling": LONGROPE | {"short_factor": [1.5] * 7, "long_factor": [1.5] * 7}},
    {"rope_parameters": LONGROPE | {"rope_theta": 7e4, "factor": None, "original_max_position_embeddings": 3000}},
)
# Mistral's class has code of its own for these settings, the other classes share theirs.
ROPE_FAMILIES = ("llama", "mistral")
CONFIGS: list[dict[str, Any]] = [
    {"model_type": family} | {key: value for key, value in SMALL.items() if key != left_out} | own
    for family in CLASS_NAMES
    for left_out, own in [
        *((key, {}) for key in SMALL),
        *(("", own) for own in (*OWN_KEYS, *(ROPES if family in ROPE_FAMILIES else ()))),
    ]
]


def our_reading(config: dict[str, Any]) -> dict[str, Any] | None:
    """The same as :func:`stock_reading.stock_reading`; the frequencies are those of the merged model."""
    try:
        sizes = Dimensions.from_config(config, "config.json")
        rope_settings(config)
    except InputError:
        return None
    merged = model_config(Checkpoint(Path(), config, sizes, {}), Rope2DSpec(sizes.num_frequencies, ()), sizes.tied)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(merged)
    frequencies = {"frequencies": rotary.inv_freq.double().tolist(), "scaling": float(rotary.attention_scaling)}
    return asdict(sizes) | {"act": config.get("hidden_act", "silu")} | frequencies


def test_every_key_is_read_as_both_releases_read_it(tmp_path: Path) -> None:
    """Where they differ, or one cannot read the configuration, it may be refused, but nothing else is."""
    (tmp_path / "configs.json").write_text(json.dumps(CONFIGS), encoding="utf-8")
    program = Path(stock_reading.__file__).read_text(encoding="utf-8")
    old = in_transformers("4.57", program, tmp_path, tmp_path / "configs.json")["found"]
    for config, of_4 in zip(CONFIGS, old, strict=True):
        of_5, ours = stock_reading.stock_reading(config), our_reading(config)
        # transformers 4 does not know the block that 5 writes.
        only_5 = "rope_parameters" in config and not {"rope_theta", "rope_scaling"} & {
            key for key, value in config.items() if value
        }
        if ours is None:
            assert of_4 != of_5 or of_5 is None, json.dumps(config)
            continue
        for found in filter(None, (of_5, None if only_5 else of_4)):
            assert {key: ours[key] for key in found} == found, config


def test_a_config_that_the_releases_read_differently_names_both_places() -> None:
    config = {"model_type": "llama", "rope_theta": 3e5} | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 2e5}
    }
    with pytest.raises(InputError, match=r"rope_theta 300000.*rope_theta 200000.* from rope_parameters"):
        rope_settings(config)


def test_a_window_that_llama_ignores(tmp_path: Path) -> None:
    """Both artifacts give what transformers gives beyond the window, and keep the whole length."""
    base = write_base(tmp_path / "base", LlamaConfig(**SHAPE))
    settings = json.loads((base / "config.json").read_text(encoding="utf-8")) | {"sliding_window": 8}
    (base / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    adapter = write_adapter(tmp_path / "lora.pth", random_adapter(linear_modules(base)))
    exporter.merge(base, adapter, tmp_path / "merged", no_patch_rope=True)
    exporter.export(tmp_path / "merged", tmp_path / "onnx", no_verify=True)
    ids = np.random.default_rng(3).integers(0, 300, 40)
    settings["sliding_window"] = None
    (base / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(base)
        stock.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
        expected = stock(torch.tensor(ids)[None]).logits.numpy()
    for name in ("merged", "onnx"):
        model = runtime.load(tmp_path / name, dtype="auto")
        assert model.manifest.context_length == 512
        np.testing.assert_allclose(model.logits(ids), expected, rtol=0, atol=logits_bound(expected))


def in_shards(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    names = sorted(tensors)
    places = {name: f"model-0000{1 + n % 3}-of-00003.safetensors" for n, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, directory / file, {"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8"
    )


PATTERNS = {
    "whole and shards": ("model.safetensors", "shards"),
    "shards and pickle": ("shards", "pytorch_model.bin"),
    "whole and consolidated": ("model.safetensors", "consolidated.safetensors"),
    "a file that the configuration names": ("model.safetensors", "other.safetensors"),
}


@pytest.mark.parametrize("files", PATTERNS.values(), ids=PATTERNS)
def test_of_several_files_those_of_transformers_are_taken(files: tuple[str, str], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", LlamaConfig(**SHAPE))
    first = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    for number, file in enumerate(files):
        tensors = {name: tensor + number for name, tensor in first.items()}
        if file == "shards":
            in_shards(tensors, base)
        elif file.endswith(".bin"):
            torch.save(tensors, base / file)
        else:
            save_file(tensors, base / file, {"format": "pt"})
    if "other.safetensors" in files:
        settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
        named = settings | {"transformers_weights": "other.safetensors"}
        (base / "config.json").write_text(json.dumps(named), encoding="utf-8")
    expected = AutoModelForCausalLM.from_pretrained(base).state_dict()
    adapter = random_adapter(linear_modules(base))
    zero = {name: torch.zeros_like(tensor) for name, tensor in adapter.items()}
    exporter.merge(base, write_adapter(tmp_path / "lora.pth", zero), tmp_path / "out")
    found = weights(tmp_path / "out")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert set(found) == set(first)
