"""The protocol of a backend: one forward pass with explicit positions and an explicit mask."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pos2d.layout import Bools, Ints

Floats = npt.NDArray[np.float32]
# Keys and values of a sequence, ``[K, T, D]``, by the names ``layer.{i}.key`` and ``layer.{i}.value``; arrays of numpy
# or torch, as the backend computes.
KeysValues = Mapping[str, Any]


class KVCache(Protocol):
    """Keys and values of one sequence; every forward pass that gets the cache appends to it."""

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens in total."""

    def rewind(self, length: int) -> None:
        """Drop every token from slot ``length`` on."""


class BatchCache(KVCache, Protocol):
    """Keys and values of several sequences; ``lengths`` ``[B]`` is the number of tokens of each."""

    lengths: Ints


class RowCache(Protocol):
    """Keys and values of sequences that come and go, each in a row; the rows have no gaps.

    ``lengths`` ``[R]`` is the number of tokens of each row. One forward pass takes at most ``pass_rows`` rows.
    """

    lengths: Ints
    pass_rows: int

    def add(self) -> None:
        """Append an empty row."""

    def pop(self) -> None:
        """Drop the last row."""

    def move(self, source: int, target: int) -> None:
        """Replace the content of row ``target`` by that of row ``source``."""

    def swap(self, first: int, second: int) -> None:
        """Exchange the contents of two rows."""

    def rows(self, first: int, stop: int) -> Any:
        """Rows ``first`` to ``stop`` as a :class:`BatchCache`, which is valid until rows are added."""

    def take(self, row: int, length: int) -> KeysValues:
        """A copy of the keys and values of the first ``length`` tokens of a row."""

    def put(self, row: int, arrays: KeysValues) -> None:
        """Make a row hold exactly these keys and values."""


class Backend(Protocol):
    """One loaded decoder. Each backend has its own kinds of caches.

    ``device`` is the type of device that computes, by torch's names (``cpu``, ``cuda``). ``prefill_chunk`` is the
    number of prompt tokens that a forward pass best takes at once. ``kv_token_bytes`` are the bytes of the keys and
    values of one token.
    """

    device: str
    prefill_chunk: int
    kv_token_bytes: int

    def expect_branches(self, count: int) -> None:
        """Prepare for ``count`` branches in one sequence; called before the prefix that they share is prefilled."""

    def new_cache(self, capacity: int) -> Any:
        """An empty :class:`KVCache` with room for ``capacity`` tokens."""

    def new_rows(self) -> Any:
        """A :class:`RowCache` without rows."""

    def forward(
        self,
        input_ids: Ints,
        position_ids: Ints,
        pos2d: Ints,
        mask: Bools,
        cache: Any | None = None,
        rows: Ints | None = None,
        counts: Ints | None = None,
    ) -> Floats:
        """Logits ``[B, S, V]``, or ``[B, R, V]`` of the tokens that ``rows``, ``[R]`` or ``[B, R]``, lists.

        Shapes: ``input_ids`` and ``position_ids`` ``[B, S]``, ``pos2d`` ``[B, S, 2]`` (branch, time), ``mask``
        ``[B, S, T]``, True where attention is allowed; T counts the cached tokens and the S new ones.

        Sequences of different lengths have a :class:`BatchCache`. Only the first ``counts[b]`` new tokens of sequence
        ``b`` stay in it; the others are padding. A column of ``mask`` is then a slot of the sequence's own cache, and T
        is that of the longest sequence.
        """
