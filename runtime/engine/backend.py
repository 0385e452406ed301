"""The protocol of a backend: one forward pass with explicit positions and an explicit mask."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from pos2d.layout import Bools, Ints

Floats = npt.NDArray[np.float32]


class KVCache(Protocol):
    """Keys and values of one sequence; every forward pass that gets the cache appends to it."""

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens in total."""

    def rewind(self, length: int) -> None:
        """Drop every token from slot ``length`` on."""


class Backend(Protocol):
    """One loaded decoder. Each backend has its own kind of cache.

    ``device`` is the type of device that computes, by torch's names (``cpu``, ``cuda``). ``prefill_chunk`` is the
    number of prompt tokens that a forward pass best takes at once.
    """

    device: str
    prefill_chunk: int

    def expect_branches(self, count: int) -> None:
        """Prepare for ``count`` branches in one sequence; called before the prefix that they share is prefilled."""

    def new_cache(self, capacity: int) -> Any:
        """An empty :class:`KVCache` with room for ``capacity`` tokens."""

    def forward(
        self,
        input_ids: Ints,
        position_ids: Ints,
        pos2d: Ints,
        mask: Bools,
        cache: Any | None = None,
        rows: Ints | None = None,
    ) -> Floats:
        """Logits ``[B, S, V]``, or ``[B, R, V]`` of the tokens that ``rows`` ``[R]`` lists.

        Shapes: ``input_ids`` and ``position_ids`` ``[B, S]``, ``pos2d`` ``[B, S, 2]`` (branch, time), ``mask``
        ``[B, S, T]``, True where attention is allowed; T counts the cached tokens and the S new ones.
        """


class BatchCache(KVCache, Protocol):
    """Keys and values of several sequences; ``lengths`` ``[B]`` is the number of tokens of each."""

    lengths: Ints


@runtime_checkable
class BatchBackend(Protocol):
    """A decoder that takes several sequences of different lengths in one forward pass."""

    prefill_chunk: int

    def new_batch_cache(self, batch: int) -> Any:
        """An empty :class:`BatchCache` for ``batch`` sequences."""

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
        """As :meth:`Backend.forward`, with ``rows`` ``[B, R]``.

        Only the first ``counts[b]`` new tokens of sequence ``b`` stay in the cache; the others are padding. A column
        of ``mask`` is a slot of the sequence's own cache, and T is that of the longest sequence.
        """
