"""Dimensions from configurations in which keys are missing."""

from typing import Any

import pytest

from pos2d.families import Dimensions

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 4096,
}


def sizes(model_type: str, **changes: Any) -> Dimensions:
    return Dimensions.from_config(CONFIG | {"model_type": model_type} | changes, "config.json")


def test_every_head_has_keys_of_its_own_by_default() -> None:
    assert sizes("llama").kv_heads == 4
    assert sizes("llama", num_key_value_heads=None).kv_heads == 4
    assert sizes("llama", num_key_value_heads=2).kv_heads == 2


@pytest.mark.parametrize(("family", "expected"), [("llama", 16), ("mistral", 16), ("qwen2", 16), ("qwen3", 128)])
def test_heads_have_their_familys_width_by_default(family: str, expected: int) -> None:
    assert sizes(family).head_dim == sizes(family, head_dim=None).head_dim == expected
    assert sizes(family, head_dim=32).num_frequencies == 16


def test_a_sliding_window_limits_the_context() -> None:
    assert sizes("mistral", sliding_window=1024).context_length == 1024
    assert sizes("mistral", sliding_window=None).context_length == 4096
    assert sizes("mistral", sliding_window=9999).context_length == 4096
    assert sizes("qwen2", sliding_window=1024, use_sliding_window=True).context_length == 1024
    assert sizes("qwen2", sliding_window=1024, use_sliding_window=False).context_length == 4096
    assert sizes("llama", sliding_window=1024).context_length == 4096
