"""Dimensions from configurations in which keys are missing."""

from typing import Any

import pytest

from pos2d.errors import InputError
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
    assert sizes(family, num_key_value_heads=4).head_dim == expected
    assert sizes(family, num_key_value_heads=4, head_dim=32).num_frequencies == 16
    if family == "qwen3":  # no release of transformers takes null there
        with pytest.raises(InputError, match="head_dim is null, it must be a whole number"):
            sizes(family, num_key_value_heads=4, head_dim=None)
    else:
        assert sizes(family, num_key_value_heads=4, head_dim=None).head_dim == expected


def test_a_sliding_window_limits_the_context() -> None:
    def length(family: str, **changes: Any) -> int:
        return sizes(family, num_key_value_heads=4, max_position_embeddings=8192, **changes).context_length

    assert length("mistral") == 4096  # by default
    assert length("mistral", sliding_window=1024) == 1024
    assert length("mistral", sliding_window=None) == 8192
    assert length("mistral", sliding_window=9999) == 8192
    assert length("qwen2", sliding_window=1024, use_sliding_window=True, max_window_layers=1) == 1024
    assert length("qwen2", sliding_window=1024, use_sliding_window=True) == 8192  # the first 28 layers have none
    assert length("qwen2", sliding_window=1024, use_sliding_window=False) == 8192
    assert length("llama", sliding_window=1024) == 8192
