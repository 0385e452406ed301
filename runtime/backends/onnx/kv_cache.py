"""Keys and values of the tokens so far, in buffers that ONNX Runtime reads and writes in place."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from pos2d.layout import Ints

PAST, PRESENT = "past_key_values.", "present."
# Slots that are added at least: a cache that grew by one would be copied for every token.
STEP = 64


class OnnxCache:
    """One buffer ``[B, K, capacity, D]`` for the keys and one for the values of every layer, bound as past and present.

    ``lengths`` ``[B]``: the tokens of every row; what lies beyond is never read, or masked. Room on the CPU costs
    memory only where something was written.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], dtype: str, device: str, capacity: int, batch: int) -> None:
        self.lengths: Ints = np.zeros(batch, dtype=np.int64)
        self.capacity = 0
        self._shapes = {name: (batch, int(shape[1]), int(shape[3])) for name, shape in shapes.items()}
        self._dtype, self._device = dtype, device
        self._buffers: dict[str, ort.OrtValue] = {}
        self.reserve(capacity)

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max())

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens a row."""
        if capacity > self.capacity:
            self.capacity = max(-(-capacity // STEP) * STEP, self.capacity + self.capacity // 8)
            self._buffers = {name: self._room(name) for name in self._shapes}

    def rewind(self, length: int) -> None:
        self.lengths = np.minimum(self.lengths, length)

    def bind(self, binding: Any) -> None:
        """Make every buffer the past and the present of a session's binding."""
        for name, buffer in self._buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace(PAST, PRESENT), buffer)

    def _room(self, name: str) -> ort.OrtValue:
        """A buffer of the new capacity, with what the old one holds."""
        batch, heads, width = self._shapes[name]
        # On the CPU the value lies over this very array.
        room = np.zeros((batch, heads, self.capacity, width), dtype=self._dtype)
        if name in self._buffers and self.length:
            room[:, :, : self.length] = self._buffers[name].numpy()[:, :, : self.length]
        return ort.OrtValue.ortvalue_from_numpy(room, self._device, 0)
