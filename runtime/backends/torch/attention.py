"""Attention with an explicit mask for every pass, and several query heads for each head of the KV cache."""

from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

NAME = "pos2d_columns"


def columns_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """``[B, S, H, D]`` from query ``[B, H, S, D]``, keys and values ``[B, K, T, D]`` and a mask ``[B, 1, S, T]``.

    The H / K query heads that share a KV head become further rows of that head, so that the cache is read in place.
    Stock attention repeats it for every query head, which copies all of it in every step.
    """
    batch, heads, length, head_dim = query.shape
    groups = heads // key.shape[1]
    rows = query.reshape(batch, key.shape[1], groups * length, head_dim)
    mask = attention_mask if length == 1 else attention_mask.repeat(1, 1, groups, 1)
    outputs = functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return outputs.reshape(batch, heads, length, head_dim).transpose(1, 2), None


AttentionInterface.register(NAME, columns_attention)
