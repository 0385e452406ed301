"""One forward pass over several sequences on the batch axis, each with its own layout and length."""

from collections.abc import Sequence

import numpy as np

from pos2d.layout import Layout
from pos2d.runtime.engine.backend import Backend, BatchCache, Floats


def batch_cache(backend: Backend, batch: int) -> BatchCache:
    """An empty cache for ``batch`` sequences that are read together."""
    rows = backend.new_rows()
    for _ in range(batch):
        rows.add()
    cache: BatchCache = rows.rows(0, batch)
    return cache


def forward_spans(
    backend: Backend,
    layouts: Sequence[Layout],
    spans: Sequence[tuple[int, int]],
    cache: BatchCache,
    slots: Sequence[Sequence[int]],
) -> list[Floats]:
    """Feed slots ``[start, stop)`` of every layout; return logits ``[R, V]`` of the ``slots`` of each.

    Sequences are padded to the longest span. Padding sees only slot 0, comes after every real token of its sequence,
    and is overwritten in the cache by the next pass.
    """
    counts = np.array([stop - start for start, stop in spans])
    shape = (len(layouts), max(1, int(counts.max())))
    ids, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    pos2d = np.zeros((*shape, 2), dtype=np.int64)
    mask = np.zeros((*shape, max(start for start, _ in spans) + shape[1]), dtype=np.bool_)
    mask[:, :, 0] = True
    rows = np.zeros((len(layouts), max(1, *map(len, slots))), dtype=np.int64)
    for b, (layout, (start, stop)) in enumerate(zip(layouts, spans, strict=True)):
        new, filled = slice(start, stop), slice(0, stop - start)
        ids[b, filled], positions[b, filled], pos2d[b, filled] = (
            layout.ids[new],
            layout.positions[new],
            layout.pos2d[new],
        )
        mask[b, filled] = False
        mask[b, filled, :stop] = layout.mask(start, stop)
        rows[b, : len(slots[b])] = np.array(slots[b], dtype=np.int64) - start
    logits = backend.forward(ids, positions, pos2d, mask, cache, rows, counts)
    return [logits[b, : len(numbers)] for b, numbers in enumerate(slots)]
