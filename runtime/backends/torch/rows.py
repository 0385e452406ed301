"""Keys and values of many sequences in one buffer for each layer, each sequence in a row of its own."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from pos2d.layout import Ints
from pos2d.runtime.engine.backend import KV_PARTS, KVArrays, KVFormat, kv_name

FIRST_ROWS, STEP = 4, 64
# The keys and the values of one layer, [rows, K, capacity, D].
Buffers = tuple[torch.Tensor, torch.Tensor]


class TorchRows:
    """A :class:`pos2d.runtime.engine.backend.RowCache`; every layer's buffers are on the device of the layer."""

    pass_rows = 1_000_000

    def __init__(self, form: KVFormat, devices: Sequence[torch.device]) -> None:
        self.lengths: Ints = np.zeros(0, dtype=np.int64)
        self.capacity = 0
        self._form, self._dtype = form, getattr(torch, form.dtype)
        self._room = 0
        self.layers: list[Buffers] = [(self._buffer(device, 0, 0), self._buffer(device, 0, 0)) for device in devices]

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
            self._replace(0, 0)
        elif self.capacity > 4 * STEP and 2 * longest < self.capacity:
            with suppress(MemoryError, RuntimeError):  # the larger buffers serve as well
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
    def take(self, row: int, length: int) -> KVArrays:
        return {
            kv_name(layer, part): buffer[row, :, :length].to("cpu", copy=True)
            for layer, buffers in enumerate(self.layers)
            for part, buffer in zip(KV_PARTS, buffers, strict=True)
        }

    @torch.inference_mode()
    def put(self, row: int, arrays: KVArrays) -> None:
        length = next(iter(arrays.values())).shape[1]
        self.reserve(length)
        for layer, buffers in enumerate(self.layers):
            for part, buffer in zip(KV_PARTS, buffers, strict=True):
                buffer[row, :, :length] = arrays[kv_name(layer, part)]
        self.lengths[row] = length

    @torch.inference_mode()
    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens in every row."""
        if capacity > self.capacity:
            self._replace(self._room, max(_rounded(capacity), self.capacity + self.capacity // 8))

    def _buffer(self, device: torch.device, room: int, capacity: int) -> torch.Tensor:
        # Zeros, not anything: a masked value is multiplied by 0, and 0 times NaN is NaN.
        shape = (room, self._form.heads, capacity, self._form.head_dim)
        return torch.zeros(shape, dtype=self._dtype, device=device)

    def _buffers(self) -> list[torch.Tensor]:
        return [buffer for buffers in self.layers for buffer in buffers]

    def _replace(self, room: int, capacity: int) -> None:
        """Move what is filled to buffers of another size; without memory for them, nothing changes."""
        self.layers = [
            (self._moved(keys, room, capacity), self._moved(values, room, capacity)) for keys, values in self.layers
        ]
        self._room, self.capacity = room, capacity

    def _moved(self, old: torch.Tensor, room: int, capacity: int) -> torch.Tensor:
        new = self._buffer(old.device, room, capacity)
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
