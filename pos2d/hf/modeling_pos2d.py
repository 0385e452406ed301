"""Llama, Mistral, Qwen2 and Qwen3 decoders that take ``pos2d`` as well as ``position_ids``.

Every token has a position (its index in the flat sequence), a branch and a time; ``pos2d[..., 0]`` is branch and
``pos2d[..., 1]`` is time. A model called without ``pos2d`` reads one sequence: branch 0, time equal to position.
Layers, attention and loading are the stock family's own; only the rotary angles and the mask differ.
"""

import torch
from torch import nn
from transformers import (
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    MistralModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from .configuration_pos2d import Pos2DLlamaConfig, Pos2DMistralConfig, Pos2DQwen2Config, Pos2DQwen3Config


def rotary_angles(positions, inv_freq, axes):
    """Angle of every frequency: ``positions[..., axes] * inv_freq`` in float32.

    Shapes: positions int ``[B, S, 3]`` (position, branch, time), inv_freq and axes ``[F]``; returns ``[B, S, F]``.
    """
    return positions.index_select(-1, axes).float() * inv_freq.float()


def columnar_mask(times):
    """Bool ``[B, 1, S, S]`` from times ``[B, S]``: a token attends to itself and to every token of an earlier time."""
    earlier = times[:, None, :] < times[:, :, None]
    itself = torch.eye(times.shape[1], dtype=torch.bool, device=times.device)
    return (earlier | itself)[:, None]


def causal_mask(past, length, padding=None, device=None):
    """Bool ``[B, 1, length, past + length]`` in flat order; ``padding`` ``[B, past + length]`` is 0 for padding."""
    slots = torch.arange(past + length, device=device)
    mask = (slots[None, :] <= slots[past:, None])[None, None]
    return mask if padding is None else mask & padding[:, None, None, :].bool()


def sliding_window(config):
    """The number of tokens that a layer sees, or None if every layer sees all; Llama ignores a window."""
    family = type(config).model_type
    kinds = getattr(config, "layer_types", None) if family.endswith(("qwen2", "qwen3")) else None
    slides = not family.endswith("llama") and (kinds is None or "sliding_attention" in kinds)
    return getattr(config, "sliding_window", None) if slides else None


def additive(mask, dtype):
    """The mask as attention kernels add it to their scores: 0 where True, the lowest finite value elsewhere."""
    lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=mask.device)
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), lowest)


class Pos2DRotaryEmbedding(nn.Module):
    """The family's own frequencies and scaling, turned by positions ``[B, S, 3]``."""

    def __init__(self, stock, axes):
        super().__init__()
        if len(axes) != len(stock.inv_freq):
            raise ValueError(f"rope_2d names {len(axes)} axes, the model has {len(stock.inv_freq)} frequencies")
        self.stock = stock
        self.axes = tuple(axes)
        # By device and axes. Not a buffer: loaders fill those from files, and would leave this one empty.
        self.axes_on = {}

    @torch.no_grad()
    def forward(self, hidden_states, position_ids):
        inv_freq = self.stock.inv_freq
        if inv_freq.dtype != torch.float32:
            raise ValueError(
                "positions need float32 frequencies: choose the type with from_pretrained(dtype=...), not .half()"
            )
        device = hidden_states.device
        axes = self.axes_on.get((device, self.axes))
        if axes is None:
            axes = self.axes_on[device, self.axes] = torch.tensor(self.axes, device=device)
        angles = rotary_angles(position_ids, inv_freq.to(device), axes)
        angles = torch.cat((angles, angles), dim=-1)
        scaling = self.stock.attention_scaling
        return (angles.cos() * scaling).to(hidden_states.dtype), (angles.sin() * scaling).to(hidden_states.dtype)


class Pos2DModelMixin:
    """Gives a stock decoder stack three positions a token."""

    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config):
        super().__init__(config)
        self.rotary_emb = Pos2DRotaryEmbedding(self.rotary_emb, config.rope_2d["axes"])

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        pos2d=None,
        **kwargs,
    ):
        """
        Args:
            input_ids: ``[B, S]``, or ``inputs_embeds`` ``[B, S, H]``.
            attention_mask: ``[B, 1, S, T]``, bool (True where attention is allowed) or additive; or ``[B, T]`` with 0
                for padding. Left out: columnar from ``pos2d``, or causal without it.
            position_ids: ``[B, S]``, the index in the flat sequence; counted from the cache when left out.
            pos2d: ``[B, S, 2]``, branch and time; branch 0 and time equal to position when left out.

        Raises:
            ValueError: ``pos2d`` with a filled cache or padding but no 4-D mask (the times of cached tokens are not
                known here), more tokens than a sliding window holds, or a cache of fixed length.
        """
        tokens = inputs_embeds if input_ids is None else input_ids
        length, device = tokens.shape[1], tokens.device
        if getattr(past_key_values, "is_compileable", False):
            raise ValueError("caches of fixed length are not supported; leave cache_implementation out")
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        window = sliding_window(self.config)
        if window is not None and past + length > window:
            raise ValueError(
                f"{past + length} tokens do not fit the sliding window of {window}; columns have no window"
            )

        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=device)[None]
        if attention_mask is None or attention_mask.dim() != 4:
            if pos2d is None:
                attention_mask = causal_mask(past, length, attention_mask, device)
            elif past == 0 and attention_mask is None:
                attention_mask = columnar_mask(pos2d[..., 1])
            else:
                raise ValueError("pos2d after a filled cache or with padding needs attention_mask [B, 1, S, T]")
        if attention_mask.dtype == torch.bool and self.config._attn_implementation == "eager":
            attention_mask = additive(
                attention_mask, self.embed_tokens.weight.dtype if inputs_embeds is None else inputs_embeds.dtype
            )
        if pos2d is None:
            pos2d = torch.stack((torch.zeros_like(position_ids), position_ids), dim=-1)

        batch = max(position_ids.shape[0], pos2d.shape[0])
        positions = torch.cat((position_ids[..., None].expand(batch, -1, -1), pos2d.expand(batch, -1, -1)), dim=-1)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask.expand(tokens.shape[0], -1, -1, -1),
            position_ids=positions,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class Pos2DForCausalLMMixin:
    """Adds ``pos2d`` to a stock causal language model and keeps ``generate`` from running with stale positions."""

    _supports_flash_attn = False
    _supports_flex_attn = False
    model_class = None

    def __init__(self, config):
        super().__init__(config)
        self.model = self.model_class(config)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        pos2d=None,
        **kwargs,
    ):
        """Logits ``[B, S, V]``; see :meth:`Pos2DModelMixin.forward` for the arguments."""
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pos2d=pos2d,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, *args, pos2d=None, **kwargs):
        if pos2d is not None:
            raise ValueError(
                "generate() writes one branch and cannot advance pos2d; leave it out, or use `pos2d run` for branches"
            )
        return super().prepare_inputs_for_generation(*args, **kwargs)


class Pos2DLlamaModel(Pos2DModelMixin, LlamaModel):
    config_class = Pos2DLlamaConfig


class Pos2DLlamaForCausalLM(Pos2DForCausalLMMixin, LlamaForCausalLM):
    config_class = Pos2DLlamaConfig
    model_class = Pos2DLlamaModel


class Pos2DMistralModel(Pos2DModelMixin, MistralModel):
    config_class = Pos2DMistralConfig


class Pos2DMistralForCausalLM(Pos2DForCausalLMMixin, MistralForCausalLM):
    config_class = Pos2DMistralConfig
    model_class = Pos2DMistralModel


class Pos2DQwen2Model(Pos2DModelMixin, Qwen2Model):
    config_class = Pos2DQwen2Config


class Pos2DQwen2ForCausalLM(Pos2DForCausalLMMixin, Qwen2ForCausalLM):
    config_class = Pos2DQwen2Config
    model_class = Pos2DQwen2Model


class Pos2DQwen3Model(Pos2DModelMixin, Qwen3Model):
    config_class = Pos2DQwen3Config


class Pos2DQwen3ForCausalLM(Pos2DForCausalLMMixin, Qwen3ForCausalLM):
    config_class = Pos2DQwen3Config
    model_class = Pos2DQwen3Model
