"""Column-by-column decoding: one new token for every live branch in each forward pass. Knows ids only, no text."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pos2d.errors import InputError
from pos2d.footprint import PREFILL_ROWS
from pos2d.layout import Ints, Layout
from runtime.backend import Backend, Floats
from runtime.sampling import Sampler

FinishReason = Literal["stop", "length"]
# Tokens of a prompt that are read at once: their attention scores and MLP values are what a long prompt costs.
PIECE = PREFILL_ROWS


@dataclass(frozen=True, slots=True)
class Column:
    """One step: a token for every branch, ``None`` where it has ended; ``finished`` says why it did, and stays."""

    tokens: tuple[int | None, ...]
    finished: tuple[FinishReason | None, ...]


def decode(
    backend: Backend,
    layout: Layout,
    sampler: Sampler,
    *,
    max_new_tokens: int,
    end_tokens: Collection[int],
    context_length: int,
) -> Iterator[Column]:
    """Read the prompts, then yield columns until every branch has ended.

    A branch that draws an end token stops; that token is neither yielded nor fed. When the next column would pass
    ``context_length`` positions, all branches stop with ``length``.

    Raises:
        InputError: the prompts alone are longer than ``context_length``, or logits are not finite.
    """
    check_length(layout, context_length)
    cache = backend.new_cache(_capacity(layout, max_new_tokens, context_length))
    rows = read_prompts(backend, layout, cache)
    row_of = {branch: branch for branch in range(len(layout.last))}
    finished: list[FinishReason | None] = [None] * len(layout.last)

    for step in range(1, max_new_tokens + 1):
        _check_finite(rows)
        tokens: list[int | None] = [None] * len(finished)
        for branch, row in row_of.items():
            token = sampler.draw(rows[row], branch)
            if token in end_tokens:
                finished[branch] = "stop"
            else:
                tokens[branch] = token
        live = [branch for branch, token in enumerate(tokens) if token is not None]
        longer = layout.append(tokens) if live else layout
        if step == max_new_tokens or span(longer) > context_length:
            for branch in live:
                finished[branch] = "length"
        yield Column(tuple(tokens), tuple(finished))
        if all(finished):
            return
        layout = longer
        rows = forward(backend, layout, len(live), cache)
        row_of = {branch: row for row, branch in enumerate(live)}


def read_prompts(backend: Backend, layout: Layout, cache: object) -> Floats:
    """Logits ``[N, V]`` of the last token of every branch, after all of ``layout`` went into the empty ``cache``.

    Long prompts are read in pieces: nobody sees a token that stands behind him before decoding begins.
    """
    found: dict[int, Floats] = {}
    for start in range(0, len(layout), PIECE):
        stop = min(start + PIECE, len(layout))
        wanted = [slot for slot in layout.last if start <= slot < stop]
        rows = np.array(wanted or [stop - 1]) - start
        logits = forward_slots(backend, layout, start, stop, cache, rows)
        found |= dict(zip(wanted, logits, strict=False))
    return np.stack([found[slot] for slot in layout.last])


def forward(backend: Backend, layout: Layout, num_new: int, cache: object | None = None) -> Floats:
    """Logits ``[num_new, V]`` of the newest tokens of one sequence; the older ones are in ``cache``."""
    return forward_slots(backend, layout, len(layout) - num_new, len(layout), cache)


def forward_slots(
    backend: Backend, layout: Layout, start: int, stop: int, cache: object | None, rows: Ints | None = None
) -> Floats:
    """Logits ``[stop - start, V]`` of the tokens from slot ``start`` on, or ``[R, V]`` of those that ``rows`` counts
    from there; the older ones are in ``cache``."""
    new = slice(start, stop)
    mask = layout.mask(start, stop)
    logits: Floats = backend.forward(
        layout.ids[None, new], layout.positions[None, new], layout.pos2d[None, new], mask[None], cache, rows
    )[0]
    return logits


def _check_finite(logits: Floats) -> None:
    """Raises:
    InputError: something overflowed, so that any token would be as good as another.
    """
    if not np.isfinite(logits.sum(axis=-1)).all():
        raise InputError("the model gives logits that are not finite; use --dtype bfloat16 or float32")


def _capacity(layout: Layout, max_new_tokens: int, context_length: int) -> int:
    """Tokens that the sequence can have at most; in columns every token takes a position of its own."""
    columns = min(max_new_tokens, context_length - span(layout))
    tokens = len(layout) + len(layout.last) * columns
    return tokens if layout.visibility == "isolated" else min(tokens, max(context_length, len(layout)))


def span(layout: Layout) -> int:
    """Positions that the sequence takes; no layout has a time above its largest position."""
    return 1 + int(layout.positions.max())


def check_length(layout: Layout, context_length: int) -> None:
    if span(layout) > context_length:
        raise InputError(
            f"the prompts take {span(layout)} positions, the model has {context_length}; "
            "shorten them or ask fewer at once"
        )
