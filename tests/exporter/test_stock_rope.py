"""The rope settings of one branch: what transformers computes from them is what the model with 2D RoPE turns by."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pos2d.sources.checkpoints.rope import rope_settings
from pos2d.sources.stock_rope import one_branch_rope
from pos2d.spec import BRANCH, Rope2DSpec, pair_indices_for_ratio
from tests.bases import LINEAR, LLAMA3, YARN

LENGTH = 4096
SCALED = {"llama3": LLAMA3, "yarn": YARN, "linear": LINEAR, "odd linear": LINEAR | {"factor": 3.7}}
ROPES: dict[str, dict[str, Any]] = SCALED | {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "huge theta": {"rope_type": "default", "rope_theta": 1e12},
}


def rotary(head_dim: int, **rope: Any) -> Any:
    config = LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, max_position_embeddings=LENGTH, **rope
    )
    return LlamaRotaryEmbedding(config)


def one_branch(base: Any, theta: float, spec: Rope2DSpec) -> dict[str, Any]:
    """The settings as they are read from ``config.json``."""
    block = one_branch_rope(base.inv_freq.numpy(), base.attention_scaling, theta, LENGTH, spec)
    read: dict[str, Any] = json.loads(json.dumps({"rope_theta": theta, "rope_scaling": block}))
    return read


@pytest.mark.parametrize("ratio", [0.3, 1.0])
@pytest.mark.parametrize("head_dim", [12, 64])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_the_nearest_that_the_formula_reaches(name: str, head_dim: int, ratio: float) -> None:
    rope = ROPES[name]
    spec = Rope2DSpec(head_dim // 2, pair_indices_for_ratio(head_dim // 2, ratio))
    base = rotary(head_dim, rope_parameters=dict(rope))
    settings = one_branch(base, rope["rope_theta"], spec)
    found = rotary(head_dim, **settings)
    turning = np.array(spec.axes) != BRANCH
    wanted, reached = base.inv_freq.numpy()[turning], found.inv_freq.numpy()[turning]
    units = np.abs(wanted.view(np.int32) - reached.view(np.int32))
    assert units.max() <= (name in SCALED)
    # Of float32, all numbers around the quotient: none of them reaches a frequency that was missed.
    powers = (rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)).numpy()[turning]
    middle = (1 / (wanted.astype(np.float64) * powers)).astype(np.float32).view(np.int32)
    around = (middle[:, None] + np.arange(-20, 21, dtype=np.int32)).view(np.float32)
    reachable = (np.float32(1) / (around * powers[:, None]) == wanted[:, None]).any(-1)
    assert (units[reachable] == 0).all()
    # The others do not turn, and cosines and sines are scaled alike.
    angles = found.inv_freq.numpy()[~turning] * np.float32(LENGTH)
    assert (np.cos(angles) == 1).all()
    assert (np.abs(np.sin(angles)) < 1e-26).all()
    assert found.attention_scaling == base.attention_scaling


def test_the_settings_are_read_as_those_of_a_base() -> None:
    """Also a second time: a model made from such a base turns by the same frequencies."""
    spec = Rope2DSpec(6, (4, 6, 5))
    base = rotary(12, rope_parameters=dict(YARN))
    settings = one_branch(base, ROPES["yarn"]["rope_theta"], spec)
    config = {"model_type": "llama", "hidden_size": 12, "num_attention_heads": 1, "max_position_embeddings": LENGTH}
    read = rope_settings(config | settings)
    assert read["attention_factor"] == base.attention_scaling != 1
    assert settings["rope_scaling"]["short_mscale"] == settings["rope_scaling"]["long_mscale"] == base.attention_scaling
    theta = read.pop("rope_theta")
    again = one_branch(rotary(12, rope_theta=theta, rope_scaling=read), theta, Rope2DSpec(6, (2,)))
    factors, first = again["rope_scaling"]["short_factor"], settings["rope_scaling"]["short_factor"]
    assert factors == [first[0], 1e30, *first[2:]]
