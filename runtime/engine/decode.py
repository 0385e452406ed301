"""Decoding one sequence: prefill, then one new token for every live branch in each forward pass. Token ids only."""

from collections.abc import Iterator, Sequence

import numpy as np

from pos2d.layout import Ints, Layout
from pos2d.runtime.engine.backend import Backend, Floats, KVCache
from pos2d.runtime.engine.sequence import BranchSampler, Column, SequenceState


def decode(
    backend: Backend,
    layout: Layout,
    samplers: Sequence[BranchSampler],
    *,
    context_length: int,
    cache: KVCache | None = None,
    start: int = 0,
) -> Iterator[Column]:
    """Prefill the prompts, then yield columns until every branch has ended.

    ``cache`` holds the first ``start`` tokens of the layout. :class:`pos2d.runtime.engine.sequence.SequenceState` says
    when a branch ends. The tokens of the last column are not in the cache.

    Raises:
        InputError: the prompts alone are longer than ``context_length``, or logits are not finite.
    """
    sequence = SequenceState(layout, samplers, context_length)
    backend.expect_branches(len(layout.last))
    if cache is None:
        cache = backend.new_cache(sequence.capacity)
    else:
        cache.reserve(sequence.capacity)
    logits = prefill(backend, layout, cache, start)
    while True:
        yield sequence.step(logits)
        if not sequence.live:
            return
        logits = forward(backend, sequence.layout, len(sequence.live), cache)


def prefill(backend: Backend, layout: Layout, cache: KVCache, start: int = 0) -> Floats:
    """Feed ``layout`` from slot ``start`` on; return logits ``[N, V]`` of the last token of every branch.

    ``cache`` holds the tokens before ``start``. Prefill is chunked because attention scores and MLP activations grow
    with the chunk. That changes no result: during prefill no token sees a later slot.
    """
    logits_by_slot: dict[int, Floats] = {}
    for first in range(start, len(layout), backend.prefill_chunk):
        stop = min(first + backend.prefill_chunk, len(layout))
        slots = [slot for slot in layout.last if first <= slot < stop]
        # A chunk without a branch's last token still computes one row, which zip then leaves out.
        rows = np.array(slots or [stop - 1]) - first
        logits = forward_slots(backend, layout, first, stop, cache, rows)
        logits_by_slot |= dict(zip(slots, logits, strict=False))
    return np.stack([logits_by_slot[slot] for slot in layout.last])


def forward(backend: Backend, layout: Layout, num_new: int, cache: KVCache | None = None) -> Floats:
    """Logits ``[num_new, V]`` of the newest tokens of a sequence; ``cache`` holds the tokens before them."""
    return forward_slots(backend, layout, len(layout) - num_new, len(layout), cache)


def forward_slots(
    backend: Backend, layout: Layout, start: int, stop: int, cache: KVCache | None, rows: Ints | None = None
) -> Floats:
    """Feed slots ``start`` to ``stop``; return their logits ``[stop - start, V]``.

    ``cache`` holds the tokens before ``start``. With ``rows`` ``[R]``, offsets from ``start``, only the logits
    ``[R, V]`` of those tokens are computed.
    """
    new = slice(start, stop)
    mask = layout.mask(start, stop)
    logits: Floats = backend.forward(
        layout.ids[None, new], layout.positions[None, new], layout.pos2d[None, new], mask[None], cache, rows
    )[0]
    return logits
