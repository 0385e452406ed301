"""Keys and values of many sequences in one buffer for each layer, each sequence in a row of its own."""

from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from pos2d.layout import Ints
from pos2d.runtime.engine.backend import KeysValues

FIRST_ROWS, STEP = 4, 64
# The keys and the values of one layer, [rows, K, capacity, D].
Buffers = tuple[torch.Tensor, torch.Tensor]


class TorchRows:
    """A :class:`pos2d.runtime.engine.backend.RowCache`; the buffers of a layer are made when it is first written."""

    pass_rows = 1_000_000

    def __init__(self, device: torch.device) -> None:
        self.lengths: Ints = np.zeros(0, dtype=np.int64)
        self.capacity = 0
        self.layers: list[Buffers] = []
        self._device = device
        self._room = 0

    @torch.inference_mode()
    def add(self) -> None:
        if len(self.lengths) == self._room:
            self._replace(max(FIRST_ROWS, 2 * self._room), self.capacity)
        self.lengths = np.append(self.lengths, 0)

    @torch.inference_mode()
    def pop(self) -> None:
        self.lengths = self.lengths[:-1]
        longest = int(self.lengths.max(initial=0))
        if not len(self.lengths):
            self._room, self.capacity, self.layers = 0, 0, []
        elif self.capacity > 4 * STEP and 2 * longest < self.capacity:
            self._replace(self._room, _rounded(longest))

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        length = int(self.lengths[source])
        for buffer in self._buffers():
            buffer[target, :, :length] = buffer[source, :, :length]
        self.lengths[target] = length

    @torch.inference_mode()
    def swap(self, first: int, second: int) -> None:
        kept = self.take(first, int(self.lengths[first]))
        self.move(second, first)
        self.put(second, kept)

    def rows(self, first: int, stop: int) -> "TorchRowsView":
        return TorchRowsView(self, first, stop)

    @torch.inference_mode()
    def take(self, row: int, length: int) -> KeysValues:
        return {
            f"layer.{layer}.{part}": buffer[row, :, :length].to("cpu", copy=True)
            for layer, buffers in enumerate(self.layers)
            for part, buffer in zip(("key", "value"), buffers, strict=True)
        }

    @torch.inference_mode()
    def put(self, row: int, arrays: KeysValues) -> None:
        if not self.layers:
            for layer in range(len(arrays) // 2):
                self.make_layer(arrays[f"layer.{layer}.key"], arrays[f"layer.{layer}.value"])
        length = next(iter(arrays.values())).shape[1]
        self.reserve(length)
        for layer, (keys, values) in enumerate(self.layers):
            keys[row, :, :length] = arrays[f"layer.{layer}.key"]
            values[row, :, :length] = arrays[f"layer.{layer}.value"]
        self.lengths[row] = length

    @torch.inference_mode()
    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens in every row."""
        if capacity > self.capacity:
            self._replace(self._room, max(_rounded(capacity), self.capacity + self.capacity // 8))

    def make_layer(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Make the buffers of the next layer, of the shapes ``[..., K, T, D]`` and the types of its first states."""
        self.layers.append((self._buffer(keys), self._buffer(values)))

    def _buffer(self, states: torch.Tensor) -> torch.Tensor:
        # Zeros, not anything: a masked value is multiplied by 0, and 0 times NaN is NaN.
        shape = (self._room, states.shape[-3], self.capacity, states.shape[-1])
        return torch.zeros(shape, dtype=states.dtype, device=self._device)

    def _buffers(self) -> list[torch.Tensor]:
        return [buffer for buffers in self.layers for buffer in buffers]

    def _replace(self, room: int, capacity: int) -> None:
        """Move what is filled to buffers of another size."""
        self._room, self.capacity = room, capacity
        self.layers = [(self._moved(keys), self._moved(values)) for keys, values in self.layers]

    def _moved(self, old: torch.Tensor) -> torch.Tensor:
        new = self._buffer(old)
        for row, length in enumerate(self.lengths.tolist()):
            new[row, :, :length] = old[row, :, :length]
        return new


class TorchRowsView(Cache):  # type: ignore[misc]
    """Some neighbouring rows as the cache of a forward pass; :meth:`reserve` comes before it."""

    is_compileable = False

    def __init__(self, rows: TorchRows, first: int, stop: int) -> None:
        super().__init__(layers=[])
        self._rows, self._span = rows, slice(first, stop)

    @property
    def lengths(self) -> Ints:
        return self._rows.lengths[self._span]

    @lengths.setter
    def lengths(self, lengths: Ints) -> None:
        self._rows.lengths[self._span] = lengths

    @property
    def length(self) -> int:
        """The number of tokens in the longest row."""
        return int(self.lengths.max())

    def reserve(self, capacity: int) -> None:
        self._rows.reserve(capacity)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> Buffers:
        """Write the new states behind those of each row; return what the pass attends to, ``[B, K, T, D]``."""
        if layer_idx == len(self._rows.layers):
            self._rows.make_layer(key_states, value_states)
        new, lengths = key_states.shape[-2], self.lengths
        total = self.length + new
        keys, values = (buffer[self._span] for buffer in self._rows.layers[layer_idx])
        if (lengths == lengths[0]).all():
            keys[:, :, lengths[0] : total] = key_states
            values[:, :, lengths[0] : total] = value_states
        else:
            slots = torch.as_tensor(lengths[:, None] + np.arange(new), device=keys.device)
            batch = torch.arange(len(lengths), device=keys.device)[:, None]
            keys[batch, :, slots] = key_states.transpose(1, 2)
            values[batch, :, slots] = value_states.transpose(1, 2)
        return keys[:, :, :total], values[:, :, :total]


def _rounded(capacity: int) -> int:
    return -(-capacity // STEP) * STEP
