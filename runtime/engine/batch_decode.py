"""Decoding several independent sequences on the batch axis, each with its own branches and length."""

from collections.abc import Iterator, Sequence

import numpy as np

from pos2d.layout import Layout
from pos2d.runtime.engine.backend import BatchBackend, BatchCache, Floats
from pos2d.runtime.engine.sequence import Column, SequenceState


def decode_batch(backend: BatchBackend, sequences: Sequence[SequenceState]) -> Iterator[list[Column | None]]:
    """Prefill all prompts, then yield the next column of every sequence, None for a sequence that has ended.

    A sequence gives the same columns as alone: no token sees a token of another sequence.

    Raises:
        InputError: logits are not finite.
    """
    cache = backend.new_batch_cache(len(sequences))
    logits: list[Floats | None] = [*_prefill(backend, sequences, cache)]
    while True:
        yield [None if rows is None else s.step(rows) for s, rows in zip(sequences, logits, strict=True)]
        if not any(sequence.live for sequence in sequences):
            return
        layouts = [sequence.layout for sequence in sequences]
        spans = [(len(s.layout) - len(s.live), len(s.layout)) for s in sequences]
        slots = [range(*span) for span in spans]
        logits = [
            rows if sequence.live else None
            for rows, sequence in zip(forward_spans(backend, layouts, spans, cache, slots), sequences, strict=True)
        ]


def _prefill(backend: BatchBackend, sequences: Sequence[SequenceState], cache: BatchCache) -> list[Floats]:
    """Logits ``[N, V]`` of the last token of every branch, for every sequence."""
    layouts = [sequence.layout for sequence in sequences]
    logits_by_slot: list[dict[int, Floats]] = [{} for _ in layouts]
    chunk = max(1, backend.prefill_chunk // len(layouts))
    for start in range(0, max(map(len, layouts)), chunk):
        spans = [(min(start, len(layout)), min(start + chunk, len(layout))) for layout in layouts]
        slots = [
            [slot for slot in layout.last if first <= slot < stop]
            for layout, (first, stop) in zip(layouts, spans, strict=True)
        ]
        logits = forward_spans(backend, layouts, spans, cache, slots)
        for rows, numbers, values in zip(logits_by_slot, slots, logits, strict=True):
            rows |= dict(zip(numbers, values, strict=True))
    return [
        np.stack([rows[slot] for slot in layout.last]) for rows, layout in zip(logits_by_slot, layouts, strict=True)
    ]


def forward_spans(
    backend: BatchBackend,
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
