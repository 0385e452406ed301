"""The protocol of a backend: one forward pass with explicit positions and an explicit mask."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from pos2d.dtypes import ITEM_BYTES
from pos2d.layout import Bools, Ints

Floats = npt.NDArray[np.float32]
# Keys and values ``[K, T, D]`` of one sequence outside a cache, by the names of :func:`kv_name`.
KVArrays = Mapping[str, Any]
KV_PARTS = ("key", "value")


def kv_name(layer: int, part: str) -> str:
    """The name of the keys or the values (``part``) of a layer."""
    return f"layer.{layer}.{part}"


@dataclass(frozen=True, slots=True)
class KVFormat:
    """The form of a model's keys and values outside a cache: arrays of numpy, or torch tensors on the CPU.

    ``dtype`` is torch's name for their type.
    """

    layers: int
    heads: int
    head_dim: int
    dtype: str
    framework: Literal["np", "pt"]

    def shapes(self, length: int) -> dict[str, tuple[int, int, int]]:
        """Name and shape of every array for ``length`` tokens."""
        shape = (self.heads, length, self.head_dim)
        return {kv_name(layer, part): shape for layer in range(self.layers) for part in KV_PARTS}

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        return len(KV_PARTS) * self.layers * self.heads * self.head_dim * ITEM_BYTES[self.dtype]


class KVCache(Protocol):
    """Keys and values of one sequence; every forward pass that gets the cache appends to it."""

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens in total."""

    def rewind(self, length: int) -> None:
        """Drop every token from slot ``length`` on."""

    def take(self, length: int) -> KVArrays:
        """Copies of the keys and values of the first ``length`` tokens."""

    def put(self, arrays: KVArrays) -> None:
        """Hold exactly the tokens whose keys and values :meth:`take` returned for the same model."""


class BatchCache(KVCache, Protocol):
    """Keys and values of several sequences; ``lengths`` ``[B]`` is the number of tokens of each."""

    lengths: Ints


class RowCache(Protocol):
    """Keys and values of sequences that come and go, each in a row; the rows have no gaps.

    ``lengths`` ``[R]`` is the number of tokens of each row. One forward pass takes at most ``pass_rows`` rows.
    """

    lengths: Ints
    pass_rows: int

    def add(self, capacity: int = 0) -> None:
        """Append an empty row, with room for ``capacity`` tokens."""

    def pop(self) -> None:
        """Drop the last row."""

    def move(self, source: int, target: int) -> None:
        """Replace the content of row ``target`` by that of row ``source``."""

    def swap(self, first: int, second: int) -> None:
        """Exchange the contents of two rows."""

    def rows(self, first: int, stop: int) -> Any:
        """Rows ``first`` to ``stop`` as a :class:`BatchCache`, which is valid until rows are added."""

    def take(self, row: int, length: int) -> KVArrays:
        """A copy of the keys and values of the first ``length`` tokens of a row."""

    def put(self, row: int, arrays: KVArrays) -> None:
        """Make a row hold exactly these keys and values."""


class Backend(Protocol):
    """One loaded decoder. Each backend has its own kinds of caches.

    ``device`` is the type of device that computes, by torch's names (``cpu``, ``cuda``). ``prefill_chunk`` is the
    number of prompt tokens that a forward pass best takes at once. ``arithmetic`` says how it computes, as far as that
    changes keys and values by more than rounding in another order: the keys and values that one backend computed serve
    another if their ``arithmetic`` is equal.
    """

    device: str
    prefill_chunk: int

    @property
    def arithmetic(self) -> Mapping[str, str]: ...

    @property
    def kv_format(self) -> KVFormat: ...

    def expect_branches(self, count: int) -> None:
        """Prepare for ``count`` branches in one sequence; called before the prefix that they share is prefilled."""

    def load_for(self, count: int) -> None:
        """Load now what the first pass over ``count`` branches would load."""

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
