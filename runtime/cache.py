"""Keys and values of the tokens so far, in buffers that are written in place."""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

FIRST_CAPACITY = 256


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values ``[B, K, T, D]``: views of buffers with room for more, which double when full.

    A cache that is as long as its content is copied as a whole for every token.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        past = self.get_seq_length()
        length = past + key_states.shape[-2]
        if past == 0:
            self._rooms = [_room(states, 0, length) for states in (key_states, value_states)]
        elif length > self._rooms[0].shape[-2]:
            self._rooms = [_room(states, past, length) for states in self._rooms]
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, past:length] = states
        self.keys, self.values = (room[:, :, :length] for room in self._rooms)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return self.keys, self.values


def new_cache() -> Cache:
    return Cache(layer_class_to_replicate=RoomyLayer)


def _room(states: torch.Tensor, filled: int, length: int) -> torch.Tensor:
    """A buffer of twice ``length``, with what is ``filled`` of ``states``."""
    batch, heads, _, width = states.shape
    room = states.new_empty(batch, heads, max(FIRST_CAPACITY, 2 * length), width)
    room[:, :, :filled] = states[:, :, :filled]
    return room
