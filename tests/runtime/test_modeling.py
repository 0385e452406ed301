"""The model files that travel: what they compute beside the goldens, and what they refuse to compute wrongly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

from pos2d import exporter, runtime
from pos2d.hf.modeling_pos2d import Pos2DQwen2ForCausalLM, Pos2DRotaryEmbedding
from tests.bounds import logits_bound
from tests.conftest import Golden

ArtifactOf = Callable[[Golden, str], Path]
IDS = torch.tensor([[5, 60, 7, 80, 9, 11]])


@pytest.fixture
def model(qwen2: Golden, artifact_of: ArtifactOf) -> Any:
    return Pos2DQwen2ForCausalLM.from_pretrained(artifact_of(qwen2, "merged")).eval()


@torch.no_grad()
def test_positions_go_on_after_the_cache(model: Any) -> None:
    cache = DynamicCache()
    pieces = [model(IDS[:, part], past_key_values=cache, use_cache=True).logits for part in (slice(0, 4), slice(4, 6))]
    whole = model(IDS).logits
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=logits_bound(whole))


@torch.no_grad()
def test_eager_and_sdpa_attention_agree(model: Any, qwen2: Golden, artifact_of: ArtifactOf) -> None:
    directory = artifact_of(qwen2, "merged")
    eager = Pos2DQwen2ForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    expected = model(IDS).logits
    torch.testing.assert_close(eager(IDS).logits, expected, rtol=0, atol=logits_bound(expected))


def test_angles_are_float32_whatever_the_type_of_the_model() -> None:
    class Stock(torch.nn.Module):
        inv_freq = torch.tensor([1.0, 0.01])
        attention_scaling = 1.5

    positions = torch.tensor([[[1001, 128, 7], [4095, 256, 3]]])
    rotary: Any = Pos2DRotaryEmbedding
    cos, sin = rotary(Stock(), (0, 2))(torch.zeros(1, dtype=torch.bfloat16), positions)
    angles = np.array([[1001.0, 0.07], [4095.0, 0.03]], dtype=np.float32)
    expected = torch.from_numpy(np.concatenate([angles, angles], axis=-1))[None]
    torch.testing.assert_close(cos, (expected.cos() * 1.5).bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(sin, (expected.sin() * 1.5).bfloat16(), rtol=0, atol=0)


@torch.no_grad()
def test_what_it_refuses(model: Any) -> None:
    pos2d = torch.stack([torch.zeros_like(IDS), torch.arange(6)[None]], dim=-1)
    cache = DynamicCache()
    model(IDS, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="needs attention_mask"):
        model(IDS, pos2d=pos2d, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="needs attention_mask"):
        model(IDS, pos2d=pos2d, attention_mask=torch.ones_like(IDS))
    with pytest.raises(ValueError, match="fixed length"):
        model(IDS, past_key_values=StaticCache(config=model.config, max_cache_len=16), use_cache=True)
    model.config.sliding_window = model.model.config.sliding_window = 5
    assert model(IDS).logits.isfinite().all()  # no layer slides
    model.config.layer_types = model.model.config.layer_types = ["sliding_attention"] * model.config.num_hidden_layers
    with pytest.raises(ValueError, match="sliding window of 5"):
        model(IDS)
    with pytest.raises(ValueError, match="float32 frequencies"):
        model.half()(IDS[:, :3])


def test_flash_attention_is_refused_where_it_would_drop_the_mask(qwen2: Golden, artifact_of: ArtifactOf) -> None:
    with pytest.raises(ValueError, match=r"[Ff]lash"):
        Pos2DQwen2ForCausalLM.from_pretrained(artifact_of(qwen2, "merged"), attn_implementation="flash_attention_2")


def test_the_type_to_compute_in_is_the_one_asked_for(qwen2: Golden, artifact_of: ArtifactOf, tmp_path: Path) -> None:
    exact = runtime.load(artifact_of(qwen2, "merged")).logits(IDS.numpy())
    coarse = runtime.load(artifact_of(qwen2, "merged"), dtype="bfloat16").logits(IDS.numpy())
    assert logits_bound(exact) < np.abs(exact - coarse).max() < logits_bound(exact, torch.bfloat16)
    exporter.merge(output=tmp_path / "half", dtype="bfloat16", **qwen2.flags)
    stored = runtime.load(tmp_path / "half").logits(IDS.numpy())
    np.testing.assert_array_equal(stored, runtime.load(tmp_path / "half", dtype="bfloat16").logits(IDS.numpy()))
