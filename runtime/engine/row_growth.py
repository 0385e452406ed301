"""Larger buffers for rows of keys and values, which are filled a part at a time."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from pos2d.layout import Ints


class Rows(Protocol):
    """What is copied: ``buffers`` ``[rows, K, capacity, D]`` by name, with ``lengths`` ``[R]`` filled tokens."""

    lengths: Ints

    @property
    def buffers(self) -> Mapping[str, Any]: ...

    def new_buffer(self, name: str, room: int, capacity: int) -> Any: ...


class RowGrowth:
    """Buffers for ``room`` rows of ``capacity`` tokens.

    The tokens of a row that were copied stay as they are while more are appended; a row that gets another content must
    be forgotten.
    """

    def __init__(self, room: int, capacity: int) -> None:
        self.room, self.capacity = room, capacity
        self.buffers: dict[str, Any] = {}
        self._copied: dict[str, Ints] = {}

    def fill(self, rows: Rows, share: float) -> None:
        """Copy the tokens of a ``share`` of the buffers; of all of them, with the newest tokens, where it is 1."""
        waiting = [name for name in rows.buffers if name not in self.buffers]
        wanted = max(0, round(share * len(rows.buffers)) - len(self.buffers))
        for name in waiting[:wanted]:
            self._copied[name] = np.zeros(self.room, dtype=np.int64)
            self.buffers[name] = rows.new_buffer(name, self.room, self.capacity)
            self._copy(rows, name)
        if share >= 1:
            for name in self.buffers:
                self._copy(rows, name)

    def forget(self, row: int) -> None:
        """Copy a row again from its beginning."""
        for copied in self._copied.values():
            copied[row] = 0

    def _copy(self, rows: Rows, name: str) -> None:
        old, new, copied = rows.buffers[name], self.buffers[name], self._copied[name]
        for row, (start, stop) in enumerate(zip(copied.tolist(), rows.lengths.tolist(), strict=False)):
            if start < stop:
                new[row, :, start:stop] = old[row, :, start:stop]
        copied[: len(rows.lengths)] = rows.lengths
