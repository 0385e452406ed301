"""Keys and values of the tokens so far, in buffers that are written in place."""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

Pair = tuple[torch.Tensor, torch.Tensor]


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values ``[B, K, T, D]``: views of buffers with room for more, which double when full.

    A cache that is as long as its content would be copied as a whole for every token.
    """

    capacity = 0
    _rooms: tuple[torch.Tensor, ...] = ()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Pair:
        past = self.get_seq_length()
        length = past + key_states.shape[-2]
        if not self._rooms:
            self._rooms = tuple(_room(states, 0, max(length, self.capacity)) for states in (key_states, value_states))
        elif length > self._rooms[0].shape[-2]:
            self._rooms = tuple(_room(states, past, max(2 * length, self.capacity)) for states in self._rooms)
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, past:length] = states
        self.keys, self.values = (room[:, :, :length] for room in self._rooms)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return self.keys, self.values

    def rewind(self, length: int) -> None:
        if self._rooms:
            self.keys, self.values = (room[:, :, :length] for room in self._rooms)


class GrowingCache(Cache):  # type: ignore[misc]
    """Attention reads what is filled; room for ``capacity`` tokens is reserved at once."""

    def __init__(self, capacity: int) -> None:
        # Layers are made by the library, one at a time: what they have in common stands in their class.
        self._kind: type[GrowingLayer] = type("GrowingLayer", (GrowingLayer,), {"capacity": capacity})
        super().__init__(layer_class_to_replicate=self._kind)

    def reserve(self, capacity: int) -> None:
        self._kind.capacity = max(self._kind.capacity, capacity)

    def rewind(self, length: int) -> None:
        for layer in self.layers:
            layer.rewind(min(length, layer.get_seq_length()))


class FixedCache(Cache):  # type: ignore[misc]
    """Buffers ``[B, K, capacity, D]`` that attention always reads whole, so that every step has the same shapes.

    ``slots`` ``[S]`` says where the tokens of the next forward pass go; what lies beyond ``length`` must be masked.
    Buffers begin as zeros: a masked slot counts nothing, but not a number times nothing is still not a number.
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
    ) -> Pair:
        if layer_idx not in self._buffers:
            batch, heads, _, width = key_states.shape
            shape = (batch, heads, self.capacity, width)
            self._buffers[layer_idx] = (key_states.new_zeros(shape), value_states.new_zeros(shape))
        keys, values = self._buffers[layer_idx]
        keys.index_copy_(2, self.slots, key_states)
        values.index_copy_(2, self.slots, value_states)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reserve(self, capacity: int) -> None:
        """Buffers of another size are others: what was recorded over the old ones is of no use any more."""
        if capacity > self.capacity:
            self.capacity = max(capacity, 2 * self.capacity)
            self._buffers = {
                layer: tuple(_zero_room(states, self.length, self.capacity) for states in pair)
                for layer, pair in self._buffers.items()
            }

    def rewind(self, length: int) -> None:
        self.length = min(self.length, length)


def _zero_room(buffer: torch.Tensor, filled: int, length: int) -> torch.Tensor:
    room = _room(buffer, filled, length)
    room[:, :, filled:] = 0
    return room


def _room(states: torch.Tensor, filled: int, length: int) -> torch.Tensor:
    """A buffer of ``length``, with what is ``filled`` of ``states``."""
    batch, heads, _, width = states.shape
    room = states.new_empty(batch, heads, length, width)
    room[:, :, :filled] = states[:, :, :filled]
    return room
