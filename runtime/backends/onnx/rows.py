"""Keys and values of many sequences in one buffer for each layer, whose rows ONNX Runtime reads and writes in place."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from pos2d.layout import Ints
from pos2d.onnx_io import present_of
from pos2d.runtime.backends.onnx.kv_cache import STEP, short_name
from pos2d.runtime.engine.backend import KVArrays

FIRST_ROWS = 4
Array = npt.NDArray[Any]


class OnnxRows:
    """A :class:`pos2d.runtime.engine.backend.RowCache` in buffers ``[rows, K, capacity, D]`` in the CPU's memory.

    Neighbouring rows are one piece of memory, so a forward pass over some of them copies nothing. What is reserved
    costs no memory before it is written. ``version`` counts how often the buffers were replaced.
    """

    pass_rows = 1_000_000

    def __init__(self, shapes: Mapping[str, Sequence[int | str]], dtype: str) -> None:
        self._shapes = {name: (int(shape[1]), int(shape[3])) for name, shape in shapes.items()}
        self._dtype = dtype
        self.lengths: Ints = np.zeros(0, dtype=np.int64)
        self.capacity = 0
        self.version = 0
        self._room = 0
        self._buffers: dict[str, Array] = {}
        self._views: dict[tuple[int, int], OnnxRowsView] = {}

    def add(self) -> None:
        if len(self.lengths) == self._room:
            self._replace(max(FIRST_ROWS, 2 * self._room), self.capacity)
        self.lengths = np.append(self.lengths, 0)

    def pop(self) -> None:
        self.lengths = self.lengths[:-1]
        longest = int(self.lengths.max(initial=0))
        if not len(self.lengths):
            self._replace(0, 0)
        elif self.capacity > 4 * STEP and 2 * longest < self.capacity:  # what is read in every pass
            with suppress(MemoryError):  # the larger buffers serve as well
                self._replace(self._room, -(-longest // STEP) * STEP)

    def move(self, source: int, target: int) -> None:
        length = int(self.lengths[source])
        for buffer in self._buffers.values():
            buffer[target, :, :length] = buffer[source, :, :length]
        self.lengths[target] = length

    def swap(self, first: int, second: int) -> None:
        kept = self.take(first, int(self.lengths[first]))
        self.move(second, first)
        self.put(second, kept)

    def rows(self, first: int, stop: int) -> "OnnxRowsView":
        return self._views.setdefault((first, stop), OnnxRowsView(self, first, stop))

    def take(self, row: int, length: int) -> KVArrays:
        return {short_name(name): buffer[row, :, :length].copy() for name, buffer in self._buffers.items()}

    def put(self, row: int, arrays: KVArrays) -> None:
        length = next(iter(arrays.values())).shape[1]
        self.reserve(length)
        for name, buffer in self._buffers.items():
            buffer[row, :, :length] = arrays[short_name(name)]
        self.lengths[row] = length

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens in every row."""
        if capacity > self.capacity:
            self._replace(self._room, max(-(-capacity // STEP) * STEP, self.capacity + self.capacity // 8))

    def buffers(self, first: int, stop: int) -> dict[str, ort.OrtValue]:
        """The buffers of some rows, by the name of the graph's input; they share the memory of this object."""
        return {
            name: ort.OrtValue.ortvalue_from_numpy(buffer[first:stop], "cpu", 0)
            for name, buffer in self._buffers.items()
        }

    def _replace(self, room: int, capacity: int) -> None:
        """Move what is filled to buffers of another size; without memory for them, nothing changes."""
        # Zeros, not anything: a masked value is multiplied by 0, and 0 times NaN is NaN. They cost nothing yet.
        new: dict[str, Array] = {
            name: np.zeros((room, heads, capacity, head_dim), dtype=self._dtype)
            for name, (heads, head_dim) in self._shapes.items()
        }
        self._views.clear()  # they hold the old buffers
        for name, buffer in new.items():
            for row, length in enumerate(self.lengths):
                buffer[row, :, :length] = self._buffers[name][row, :, :length]
            self._buffers[name] = buffer
        self._room, self.capacity = room, capacity
        self.version += 1


class OnnxRowsView:
    """Some neighbouring rows as the cache of a forward pass."""

    def __init__(self, rows: OnnxRows, first: int, stop: int) -> None:
        self._rows, self._span = rows, slice(first, stop)
        self._values: dict[str, ort.OrtValue] = {}

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

    @property
    def capacity(self) -> int:
        return self._rows.capacity

    @property
    def version(self) -> int:
        return self._rows.version

    def reserve(self, capacity: int) -> None:
        self._rows.reserve(capacity)

    def bind(self, binding: Any) -> None:
        """Bind every buffer as the past input and the present output of a session."""
        self._values = self._rows.buffers(self._span.start, self._span.stop)
        for name, value in self._values.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(present_of(name), value)
