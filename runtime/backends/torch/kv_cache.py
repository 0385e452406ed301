"""Keys and values of the tokens so far, in buffers that are written in place."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from pos2d.runtime.engine.backend import KV_PARTS, KVArrays, kv_name

KeysValues = tuple[torch.Tensor, torch.Tensor]
CPU = torch.device("cpu")


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
    """A cache whose attention reads only the filled slots; every layer reserves ``capacity`` slots at once.

    ``devices`` are those of the layers, in their order; without them, :meth:`put` places all on the CPU.
    """

    def __init__(self, capacity: int, devices: Sequence[torch.device] = ()) -> None:
        super().__init__(layers=[])
        self.capacity = capacity
        self._devices = devices

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

    def take(self, length: int) -> dict[str, torch.Tensor]:
        layers = [(layer.keys, layer.values) for layer in self.layers]
        return _copies(dict(enumerate(layers)), length)

    @torch.inference_mode()
    def put(self, arrays: KVArrays) -> None:
        self.rewind(0)
        for layer, pair in enumerate(_pairs(arrays)):
            device = self._devices[layer] if self._devices else CPU
            keys, values = (states[None].to(device) for states in pair)
            self.update(keys, values, layer)


class FixedCache(Cache):  # type: ignore[misc]
    """Buffers ``[B, K, capacity, D]`` that attention always reads as a whole, so that every step has the same shapes.

    ``slots`` ``[S]`` are those that the next forward pass writes; slots from ``length`` on must be masked. Buffers
    start as zeros, because a masked slot is multiplied by 0, and 0 times NaN is NaN.
    """

    is_compileable = False

    def __init__(self, capacity: int, device: torch.device = CPU) -> None:
        super().__init__(layers=[])
        self.capacity = capacity
        self.length: int = 0
        self._device = device
        self.slots = torch.empty(0, dtype=torch.long)
        self._buffers: dict[int, tuple[torch.Tensor, ...]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> KeysValues:
        keys, values = self._layer(layer_idx, (key_states, value_states))
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

    def take(self, length: int) -> dict[str, torch.Tensor]:
        return _copies(self._buffers, length)

    @torch.inference_mode()
    def put(self, arrays: KVArrays) -> None:
        pairs = _pairs(arrays)
        length = pairs[0][0].shape[-2]
        self.rewind(0)
        self.reserve(length)
        for layer, pair in enumerate(pairs):
            on_device = tuple(states[None].to(self._device) for states in pair)
            for buffer, states in zip(self._layer(layer, on_device), on_device, strict=True):
                buffer[:, :, :length] = states
        self.length = length

    def _layer(self, layer: int, states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The buffers of a layer, which are made for such ``states`` ``[B, K, S, D]`` where there are none."""
        if layer not in self._buffers:
            batch, heads, _, head_dim = states[0].shape
            shape = (batch, heads, self.capacity, head_dim)
            self._buffers[layer] = tuple(part.new_zeros(shape) for part in states)
        return self._buffers[layer]


def _copies(layers: dict[int, tuple[torch.Tensor, ...]], length: int) -> dict[str, torch.Tensor]:
    """Copies on the CPU of the first ``length`` slots of buffers ``[1, K, ≥ length, D]``."""
    return {
        kv_name(layer, part): torch.empty_like(
            states[0, :, :length], device=CPU, memory_format=torch.contiguous_format
        ).copy_(states[0, :, :length])
        for layer, pair in layers.items()
        for part, states in zip(KV_PARTS, pair, strict=True)
    }


def _pairs(arrays: KVArrays) -> list[tuple[torch.Tensor, ...]]:
    """The keys and the values of every layer, in the order of the layers."""
    count = len(arrays) // len(KV_PARTS)
    return [tuple(arrays[kv_name(layer, part)] for part in KV_PARTS) for layer in range(count)]


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
