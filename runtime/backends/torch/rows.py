"""Keys and values of many sequences in one buffer for each layer, as tensors on the devices of the layers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from pos2d.runtime.engine.backend import KV_PARTS, KVFormat, kv_name
from pos2d.runtime.engine.row_buffers import RowBuffers, RowSpan


class TorchRows(RowBuffers):
    """Rows in tensors; ``devices`` are those of the layers."""

    def __init__(self, form: KVFormat, devices: Sequence[torch.device]) -> None:
        self._form = form
        self._devices = {kv_name(layer, part): device for layer, device in enumerate(devices) for part in KV_PARTS}
        super().__init__(self._devices)

    def new_buffer(self, name: str, room: int, capacity: int) -> torch.Tensor:
        shape = (room, self._form.heads, capacity, self._form.head_dim)
        with torch.inference_mode(False):  # so that the buffer can be written between forward passes, too
            return torch.zeros(shape, dtype=getattr(torch, self._form.dtype), device=self._devices[name])

    def copied(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.to("cpu", copy=True)

    def rows(self, first: int, stop: int) -> "TorchRowsView":
        return TorchRowsView(self, first, stop)


class TorchRowsView(RowSpan, Cache):  # type: ignore[misc]
    """Some neighbouring rows as the cache of a forward pass; :meth:`reserve` comes before it."""

    is_compileable = False

    def __init__(self, rows: TorchRows, first: int, stop: int) -> None:
        Cache.__init__(self, layers=[])
        RowSpan.__init__(self, rows, first, stop)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new states behind those of each row; return what the pass attends to, ``[B, K, T, D]``."""
        new, lengths = key_states.shape[-2], self.lengths
        total = self.length + new
        keys, values = (self._rows.buffers[kv_name(layer_idx, part)][self._span] for part in KV_PARTS)
        if (lengths == lengths[0]).all():
            keys[:, :, lengths[0] : total] = key_states
            values[:, :, lengths[0] : total] = value_states
        else:
            slots = torch.as_tensor(lengths[:, None] + np.arange(new), device=keys.device)
            batch = torch.arange(len(lengths), device=keys.device)[:, None]
            keys[batch, :, slots] = key_states.transpose(1, 2)
            values[batch, :, slots] = value_states.transpose(1, 2)
        return keys[:, :, :total], values[:, :, :total]
