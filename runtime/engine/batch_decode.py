"""Several independent sequences in one step, on the batch axis: each with its own branches and its own length."""

from collections.abc import Iterator, Sequence

import numpy as np

from pos2d.layout import Layout
from pos2d.runtime.engine.backend import BatchBackend, BatchCache, Floats
from pos2d.runtime.engine.sequence import Column, Decoding


def decode_together(backend: BatchBackend, sequences: Sequence[Decoding]) -> Iterator[list[Column | None]]:
    """Read all prompts, then yield the next column of every sequence, ``None`` of those that have ended.

    What a sequence gives is what it gives alone: no token sees one of another sequence.

    Raises:
        InputError: logits are not finite.
    """
    cache = backend.new_batch_cache(len(sequences))
    logits = _read_prompts(backend, sequences, cache)
    while True:
        yield [None if rows is None else s.take(rows) for s, rows in zip(sequences, logits, strict=True)]
        if not any(sequence.live for sequence in sequences):
            return
        layouts = [sequence.layout for sequence in sequences]
        spans = [(len(s.layout) - len(s.live), len(s.layout)) for s in sequences]
        wanted = [list(range(*span)) for span in spans]
        logits = [
            rows if sequence.live else None
            for rows, sequence in zip(forward_spans(backend, layouts, spans, cache, wanted), sequences, strict=True)
        ]


def _read_prompts(backend: BatchBackend, sequences: Sequence[Decoding], cache: BatchCache) -> "list[Floats | None]":
    """Logits ``[N, V]`` of the last token of every branch, for every sequence."""
    layouts = [sequence.layout for sequence in sequences]
    found: list[dict[int, Floats]] = [{} for _ in layouts]
    piece = max(1, backend.piece // len(layouts))
    for start in range(0, max(map(len, layouts)), piece):
        spans = [(min(start, len(layout)), min(start + piece, len(layout))) for layout in layouts]
        wanted = [
            [slot for slot in x.last if first <= slot < stop] for x, (first, stop) in zip(layouts, spans, strict=True)
        ]
        for rows, slots, logits in zip(
            found, wanted, forward_spans(backend, layouts, spans, cache, wanted), strict=True
        ):
            rows |= dict(zip(slots, logits, strict=True))
    return [np.stack([rows[slot] for slot in layout.last]) for rows, layout in zip(found, layouts, strict=True)]


def forward_spans(
    backend: BatchBackend,
    layouts: Sequence[Layout],
    spans: Sequence[tuple[int, int]],
    cache: BatchCache,
    wanted: Sequence[Sequence[int]],
) -> list[Floats]:
    """Feed the tokens of slots ``[start, stop)`` of every layout; logits ``[R, V]`` of its ``wanted`` slots.

    Rows are padded to the longest span. Padding sees the first slot alone, stands behind every real token of its row,
    and is overwritten by the next.
    """
    counts = np.array([stop - start for start, stop in spans])
    shape = (len(layouts), max(1, int(counts.max())))
    ids, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    pos2d = np.zeros((*shape, 2), dtype=np.int64)
    mask = np.zeros((*shape, max(start for start, _ in spans) + shape[1]), dtype=np.bool_)
    mask[:, :, 0] = True
    rows = np.zeros((len(layouts), max(1, *map(len, wanted))), dtype=np.int64)
    for row, (layout, (start, stop)) in enumerate(zip(layouts, spans, strict=True)):
        new, here = slice(start, stop), slice(0, stop - start)
        ids[row, here], positions[row, here], pos2d[row, here] = (
            layout.ids[new],
            layout.positions[new],
            layout.pos2d[new],
        )
        mask[row, here] = False
        mask[row, here, :stop] = layout.mask(start, stop)
        rows[row, : len(wanted[row])] = np.array(wanted[row], dtype=np.int64) - start
    logits = backend.forward(ids, positions, pos2d, mask, cache, rows, counts)
    return [logits[row, : len(slots)] for row, slots in enumerate(wanted)]
