"""Column-by-column decoding: one new token for every live branch in each forward pass. Knows ids only, no text."""

from collections.abc import Iterator, Sequence

import numpy as np

from pos2d.layout import Ints, Layout
from pos2d.runtime.engine.backend import Backend, Floats, KVCache
from pos2d.runtime.engine.sequence import Column, Decoding, Writer


def decode(
    backend: Backend,
    layout: Layout,
    writers: Sequence[Writer],
    *,
    context_length: int,
    cache: KVCache | None = None,
    start: int = 0,
) -> Iterator[Column]:
    """Read the prompts, then yield columns until every branch has ended. ``cache`` holds the first ``start`` tokens.

    When a branch ends says :class:`pos2d.runtime.engine.sequence.Decoding`. What the last column yields is not in the
    cache.

    Raises:
        InputError: the prompts alone are longer than ``context_length``, or logits are not finite.
    """
    sequence = Decoding(layout, writers, context_length)
    backend.expect_branches(len(layout.last))
    if cache is None:
        cache = backend.new_cache(sequence.capacity)
    else:
        cache.reserve(sequence.capacity)
    logits = read_prompts(backend, layout, cache, start)
    while True:
        yield sequence.take(logits)
        if not sequence.live:
            return
        logits = forward(backend, sequence.layout, len(sequence.live), cache)


def read_prompts(backend: Backend, layout: Layout, cache: KVCache, begin: int = 0) -> Floats:
    """Logits ``[N, V]`` of the last token of every branch, after all of ``layout`` from slot ``begin`` on went into
    ``cache``, which holds what stands before.

    Long prompts are read in pieces, because the scores and MLP values of a piece are what it costs: nobody sees a token
    that stands behind him before decoding begins.
    """
    found: dict[int, Floats] = {}
    for start in range(begin, len(layout), backend.piece):
        stop = min(start + backend.piece, len(layout))
        wanted = [slot for slot in layout.last if start <= slot < stop]
        rows = np.array(wanted or [stop - 1]) - start
        logits = forward_slots(backend, layout, start, stop, cache, rows)
        found |= dict(zip(wanted, logits, strict=False))
    return np.stack([found[slot] for slot in layout.last])


def forward(backend: Backend, layout: Layout, num_new: int, cache: KVCache | None = None) -> Floats:
    """Logits ``[num_new, V]`` of the newest tokens of one sequence; the older ones are in ``cache``."""
    return forward_slots(backend, layout, len(layout) - num_new, len(layout), cache)


def forward_slots(
    backend: Backend, layout: Layout, start: int, stop: int, cache: KVCache | None, rows: Ints | None = None
) -> Floats:
    """Logits ``[stop - start, V]`` of the tokens from slot ``start`` on, or ``[R, V]`` of those that ``rows`` counts
    from there; the older ones are in ``cache``."""
    new = slice(start, stop)
    mask = layout.mask(start, stop)
    logits: Floats = backend.forward(
        layout.ids[None, new], layout.positions[None, new], layout.pos2d[None, new], mask[None], cache, rows
    )[0]
    return logits
