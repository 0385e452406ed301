"""Prefixes that sequences have in common: which tokens two of them share, and those of sequences that have ended."""

from dataclasses import dataclass

import numpy as np

from pos2d.layout import Ints, Layout
from pos2d.runtime.engine.backend import KVArrays

# Copying fewer tokens than this saves nothing.
LEAST_SHARED = 8


def plain_length(layout: Layout) -> int:
    """Number of tokens at the beginning of a layout that stand where those of an ordinary text stand.

    Their keys and values depend on their ids alone: every one of them is in branch 0, at the position and time that is
    its index, and sees all tokens before it.
    """
    index = np.arange(len(layout))
    plain = (layout.branches == 0) & (layout.positions == index) & (layout.times == index)
    return int(len(plain) if plain.all() else plain.argmin())


def shared_length(first: Ints, second: Ints) -> int:
    """Number of equal token ids at the beginning of both."""
    length = min(len(first), len(second))
    equal = first[:length] == second[:length]
    return int(length if equal.all() else equal.argmin())


@dataclass(slots=True, eq=False)
class _Entry:
    ids: Ints
    arrays: KVArrays
    stays: bool


class PrefixStore:
    """Keys and values of prefixes that no running sequence holds, at most ``capacity`` tokens of them.

    What was used least recently is dropped first, but never what stays. ``staying_tokens`` is the number of tokens that
    are never dropped; other threads may read it.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.staying_tokens = 0
        self._entries: list[_Entry] = []  # what was used last is last

    @property
    def tokens(self) -> int:
        """The number of tokens that are kept."""
        return sum(len(entry.ids) for entry in self._entries)

    def find(self, ids: Ints) -> tuple[int, KVArrays | None]:
        """The longest beginning of ``ids`` that is kept: its length, and keys and values that begin with its own."""
        lengths = [shared_length(entry.ids, ids) for entry in self._entries]
        if not lengths or max(lengths) < LEAST_SHARED:
            return 0, None
        best = self._entries.pop(int(np.argmax(lengths)))
        self._entries.append(best)
        return max(lengths), best.arrays

    def holds(self, ids: Ints) -> bool:
        """Whether all of ``ids`` are kept."""
        return any(shared_length(entry.ids, ids) == len(ids) for entry in self._entries)

    def add(self, ids: Ints, arrays: KVArrays, *, stays: bool = False) -> None:
        """Keep a prefix; those that it begins with are dropped."""
        self._entries = [
            entry for entry in self._entries if entry.stays or shared_length(entry.ids, ids) < len(entry.ids)
        ]
        self._entries.append(_Entry(ids, arrays, stays))
        self.staying_tokens += len(ids) * stays
        self.shrink(self.capacity)

    def shrink(self, tokens: int) -> None:
        """Drop prefixes until at most ``tokens`` are kept."""
        while self.tokens > tokens and (oldest := next((e for e in self._entries if not e.stays), None)):
            self._entries.remove(oldest)


def first_tokens(arrays: KVArrays, length: int) -> KVArrays:
    """The keys and values of the first ``length`` tokens."""
    return {name: array[:, :length] for name, array in arrays.items()}
