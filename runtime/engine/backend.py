"""What the engine asks of a backend: one forward pass over explicit positions and an explicit mask."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from pos2d.layout import Bools, Ints

Floats = npt.NDArray[np.float32]


class KVCache(Protocol):
    """Keys and values of the tokens so far; it grows by every forward pass that it is given to."""

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens in all."""

    def rewind(self, length: int) -> None:
        """Forget every token from slot ``length`` on."""


class Backend(Protocol):
    """One loaded decoder; caches are the backend's own. ``device``: the kind of it that computes, as torch names
    them; ``piece``: tokens of a prompt that are best read at once."""

    device: str
    piece: int

    def expect_branches(self, count: int) -> None:
        """Say that so many branches are going to stand side by side, before what they have in common is read."""

    def new_cache(self, capacity: int) -> Any:
        """An empty :class:`KVCache` for ``capacity`` tokens."""

    def forward(
        self,
        input_ids: Ints,
        position_ids: Ints,
        pos2d: Ints,
        mask: Bools,
        cache: Any | None = None,
        rows: Ints | None = None,
    ) -> Floats:
        """Logits ``[B, S, V]``, or ``[B, R, V]`` of those tokens alone that ``rows`` ``[R]`` names.

        Shapes: ``input_ids`` and ``position_ids`` ``[B, S]``, ``pos2d`` ``[B, S, 2]``, ``mask`` ``[B, S, T]`` with True
        where attention is allowed and T the cached tokens and these.
        """


class BatchCache(KVCache, Protocol):
    """Keys and values of several sequences, each with its own number of tokens."""

    lengths: Ints


@runtime_checkable
class BatchBackend(Protocol):
    """A decoder that takes several sequences of different lengths in one pass."""

    piece: int

    def new_batch_cache(self, batch: int) -> Any:
        """An empty :class:`BatchCache` for so many sequences."""

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
        """As :meth:`Backend.forward`, with ``rows`` ``[B, R]``. Only the first ``counts[b]`` new tokens of row ``b``
        stay in the cache; a column of ``mask`` is a slot of the row's own cache, T of the longest row."""
