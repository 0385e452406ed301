"""Rows for a backend whose forward pass takes one sequence at a time: every row is a cache of its own."""

from collections.abc import Callable
from typing import Any

import numpy as np

from pos2d.layout import Ints
from pos2d.runtime.engine.backend import KVArrays


class SingleRows:
    """A :class:`pos2d.runtime.engine.backend.RowCache` of caches that ``new_cache`` makes for a capacity."""

    pass_rows = 1

    def __init__(self, new_cache: Callable[[int], Any]) -> None:
        self._new_cache = new_cache
        self._caches: list[Any] = []

    @property
    def lengths(self) -> Ints:
        return np.array([cache.length for cache in self._caches], dtype=np.int64)

    def add(self, capacity: int = 0) -> None:
        self._caches.append(self._new_cache(capacity))

    def pop(self) -> None:
        self._caches.pop()

    def move(self, source: int, target: int) -> None:
        # The source is moved on or dropped next, so both may be the same cache until then.
        self._caches[target] = self._caches[source]

    def swap(self, first: int, second: int) -> None:
        caches = self._caches
        caches[first], caches[second] = caches[second], caches[first]

    def rows(self, first: int, stop: int) -> Any:
        assert stop == first + 1
        return self._caches[first]

    def take(self, row: int, length: int) -> KVArrays:
        arrays: KVArrays = self._caches[row].take(length)
        return arrays

    def put(self, row: int, arrays: KVArrays) -> None:
        self._caches[row].put(arrays)
