"""Keys and values of many sequences, each in a row of one buffer for every layer; whatever library has the buffers."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np

from pos2d.layout import Ints
from pos2d.runtime.engine.backend import KVArrays
from pos2d.runtime.engine.row_growth import RowGrowth

FIRST_ROWS, STEP = 4, 64
# Larger buffers are filled while the last so many tokens of the old ones are written.
LEAD = 32


class RowBuffers(ABC):
    """A :class:`pos2d.runtime.engine.backend.RowCache` in buffers ``[rows, K, capacity, D]``.

    ``buffers`` has them by the names of :func:`pos2d.runtime.engine.backend.kv_name`; ``version`` counts how often they
    were replaced.
    """

    pass_rows = 1_000_000

    def __init__(self, names: Iterable[str]) -> None:
        self.lengths: Ints = np.zeros(0, dtype=np.int64)
        self.capacity = 0
        self.version = 0
        self._room = 0
        self._growth: RowGrowth | None = None
        self.buffers: dict[str, Any] = {name: self.new_buffer(name, 0, 0) for name in names}

    @abstractmethod
    def new_buffer(self, name: str, room: int, capacity: int) -> Any:
        """A buffer for ``room`` rows, of zeros: a masked value is multiplied by 0, and 0 times NaN is NaN."""

    @abstractmethod
    def copied(self, tokens: Any) -> Any:
        """A copy of a part of a buffer, ``[K, T, D]``, in the CPU's memory."""

    @abstractmethod
    def rows(self, first: int, stop: int) -> Any:
        """As :meth:`pos2d.runtime.engine.backend.RowCache.rows`."""

    def replacing(self) -> None:
        """Called before the buffers are replaced: whatever holds the old ones must let them go."""
        self.version += 1

    def add(self, capacity: int = 0) -> None:
        if len(self.lengths) == self._room:
            self._replace(max(FIRST_ROWS, 2 * self._room), max(_rounded(capacity), self.capacity))
        self.reserve(capacity)
        self.lengths = np.append(self.lengths, 0)
        self._changed(len(self.lengths) - 1)

    def pop(self) -> None:
        self.lengths = self.lengths[:-1]
        longest = int(self.lengths.max(initial=0))
        if not len(self.lengths):
            self._replace(0, 0)
        elif self.capacity > 4 * STEP and 2 * longest < self.capacity:  # what is read in every pass
            with suppress(MemoryError, RuntimeError):  # the larger buffers serve as well
                self._replace(self._room, _rounded(longest))

    def move(self, source: int, target: int) -> None:
        length = int(self.lengths[source])
        for buffer in self.buffers.values():
            buffer[target, :, :length] = buffer[source, :, :length]
        self.lengths[target] = length
        self._changed(target)

    def swap(self, first: int, second: int) -> None:
        kept = self.take(first, int(self.lengths[first]))
        self.move(second, first)
        self.put(second, kept)

    def take(self, row: int, length: int) -> KVArrays:
        return {name: self.copied(buffer[row, :, :length]) for name, buffer in self.buffers.items()}

    def put(self, row: int, arrays: KVArrays) -> None:
        length = next(iter(arrays.values())).shape[1]
        self.reserve(length)
        for name, buffer in self.buffers.items():
            buffer[row, :, :length] = arrays[name]
        self.lengths[row] = length
        self._changed(row)

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens in every row."""
        if capacity > self.capacity:
            growth, self._growth = self._growth, None
            if growth is None or growth.capacity < capacity:
                growth = RowGrowth(self._room, enlarged(self.capacity, capacity))
            self._finish(growth)

    def prepare(self, capacity: int) -> None:
        """Fill a part of larger buffers, if they are needed soon after ``capacity`` tokens.

        A pass then waits for a part of the copy only; where memory is short, it waits for all of it later.
        """
        written = capacity - (self.capacity - LEAD)
        if written <= 0:
            return
        if self._growth is None:
            self._growth = RowGrowth(self._room, enlarged(self.capacity, self.capacity + 1))
        try:
            self._growth.fill(self, written / LEAD)
        except (MemoryError, RuntimeError):
            self._growth = None

    def _replace(self, room: int, capacity: int) -> None:
        """Move what is filled to buffers of another size; without memory for them, nothing changes."""
        self._growth = None
        self._finish(RowGrowth(room, capacity))

    def _finish(self, growth: RowGrowth) -> None:
        growth.fill(self, 1.0)
        self.replacing()
        self.buffers = growth.buffers
        self._room, self.capacity = growth.room, growth.capacity

    def _changed(self, row: int) -> None:
        """Note that a row has another content than a growth copied."""
        if self._growth is not None:
            self._growth.forget(row)


class RowSpan:
    """Some neighbouring rows, as a forward pass takes them."""

    def __init__(self, rows: RowBuffers, first: int, stop: int) -> None:
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

    @property
    def capacity(self) -> int:
        return self._rows.capacity

    def reserve(self, capacity: int) -> None:
        self._rows.reserve(capacity)
        self._rows.prepare(capacity)


def enlarged(capacity: int, needed: int) -> int:
    """The new capacity of a buffer for ``needed`` tokens, which is more than its ``capacity``.

    Slots are added in multiples, and at least an eighth of them: a buffer that grew by one would be copied for every
    token.
    """
    return max(_rounded(needed), capacity + capacity // 8)


def _rounded(capacity: int) -> int:
    return -(-capacity // STEP) * STEP
