"""Keys and values of the tokens so far, in buffers that are written in place."""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

KeysValues = tuple[torch.Tensor, torch.Tensor]


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values ``[B, K, T, D]`` of one layer: views of buffers with ``capacity`` slots, which double when full.

    If buffers were exactly as long as their content, every new token would copy all of it.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._buffers: tuple[torch.Tensor, ...] = ()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> KeysValues:
        past = self.get_seq_length()
        length = past + key_states.shape[-2]
        new = (key_states, value_states)
        if not self._buffers:
            self._buffers = tuple(_enlarged(states, 0, max(length, self.capacity)) for states in new)
        elif length > self._buffers[0].shape[-2]:
            self._buffers = tuple(_enlarged(buffer, past, max(2 * length, self.capacity)) for buffer in self._buffers)
        for buffer, states in zip(self._buffers, new, strict=True):
            buffer[:, :, past:length] = states
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return self.keys, self.values

    def rewind(self, length: int) -> None:
        if self._buffers:
            self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


class GrowingCache(Cache):  # type: ignore[misc]
    """A cache whose attention reads only the filled slots; every layer reserves ``capacity`` slots at once."""

    def __init__(self, capacity: int) -> None:
        super().__init__(layers=[])
        self.capacity = capacity

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> KeysValues:
        while len(self.layers) <= layer_idx:
            self.layers.append(GrowingLayer(self.capacity))
        layer: GrowingLayer = self.layers[layer_idx]
        return layer.update(key_states, value_states)

    def reserve(self, capacity: int) -> None:
        self.capacity = max(self.capacity, capacity)
        for layer in self.layers:
            layer.capacity = self.capacity

    def rewind(self, length: int) -> None:
        for layer in self.layers:
            layer.rewind(min(length, layer.get_seq_length()))


class FixedCache(Cache):  # type: ignore[misc]
    """Buffers ``[B, K, capacity, D]`` that attention always reads as a whole, so that every step has the same shapes.

    ``slots`` ``[S]`` are those that the next forward pass writes; slots from ``length`` on must be masked. Buffers
    start as zeros, because a masked slot is multiplied by 0, and 0 times NaN is NaN.
    """

    is_compileable = False

    def __init__(self, capacity: int) -> None:
        super().__init__(layers=[])
        self.capacity = capacity
        self.length: int = 0
        self.slots = torch.empty(0, dtype=torch.long)
        self._buffers: dict[int, tuple[torch.Tensor, ...]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> KeysValues:
        if layer_idx not in self._buffers:
            batch, heads, _, head_dim = key_states.shape
            shape = (batch, heads, self.capacity, head_dim)
            self._buffers[layer_idx] = (key_states.new_zeros(shape), value_states.new_zeros(shape))
        keys, values = self._buffers[layer_idx]
        keys.index_copy_(2, self.slots, key_states)
        values.index_copy_(2, self.slots, value_states)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reserve(self, capacity: int) -> None:
        """Enlarge the buffers if ``capacity`` exceeds theirs; they then have other addresses."""
        if capacity > self.capacity:
            self.capacity = max(capacity, 2 * self.capacity)
            self._buffers = {
                layer: tuple(_enlarged_with_zeros(buffer, self.length, self.capacity) for buffer in buffers)
                for layer, buffers in self._buffers.items()
            }

    def rewind(self, length: int) -> None:
        self.length = min(self.length, length)


def _enlarged_with_zeros(buffer: torch.Tensor, filled: int, capacity: int) -> torch.Tensor:
    enlarged = _enlarged(buffer, filled, capacity)
    enlarged[:, :, filled:] = 0
    return enlarged


def _enlarged(buffer: torch.Tensor, filled: int, capacity: int) -> torch.Tensor:
    """A buffer ``[B, K, capacity, D]`` with the first ``filled`` slots of ``buffer``, and the others uninitialised."""
    batch, heads, _, head_dim = buffer.shape
    enlarged = buffer.new_empty(batch, heads, capacity, head_dim)
    enlarged[:, :, :filled] = buffer[:, :, :filled]
    return enlarged
