"""Column-by-column decoding: one new token for every live branch in each forward pass. Knows ids only, no text."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from pos2d.errors import InputError
from pos2d.footprint import PREFILL_ROWS
from pos2d.layout import Ints, Layout
from runtime.backend import Backend, Floats, KVCache

FinishReason = Literal["stop", "length"]
# Tokens of a prompt that are read at once: their attention scores and MLP values are what a long prompt costs.
PIECE = PREFILL_ROWS


class Writer(Protocol):
    """Who chooses the tokens of one branch, and says when it ends."""

    end_tokens: Collection[int]
    max_new_tokens: int

    def choose(self, logits: Floats) -> tuple[int, float | None]:
        """A token from logits ``[V]``, and the logarithm of its probability where that is noted."""

    def ended(self, token: int) -> bool:
        """Take in a token that belongs to the answer; whether the answer ends with it."""


@dataclass(frozen=True, slots=True)
class Column:
    """One step: a token for every branch, ``None`` where it has ended; ``finished`` says why it did, and stays."""

    tokens: tuple[int | None, ...]
    finished: tuple[FinishReason | None, ...]
    logprobs: tuple[float | None, ...]


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

    A branch that draws an end token stops; that token is neither yielded nor fed. A branch ends with ``length`` after
    its writer's most tokens, or when its next token would pass ``context_length`` positions; columnar branches share
    these, so that all end at once. What the last column yields is not in the cache.

    Raises:
        InputError: the prompts alone are longer than ``context_length``, or logits are not finite.
    """
    check_length(layout, context_length)
    capacity = _capacity(layout, writers, context_length)
    if cache is None:
        cache = backend.new_cache(capacity)
    else:
        cache.reserve(capacity)
    rows = read_prompts(backend, layout, cache, start)
    row_of = {branch: branch for branch in range(len(layout.last))}
    finished: list[FinishReason | None] = [None] * len(layout.last)
    written = [0] * len(layout.last)

    while True:
        _check_finite(rows)
        tokens: list[int | None] = [None] * len(finished)
        logprobs: list[float | None] = [None] * len(finished)
        for branch, row in row_of.items():
            writer = writers[branch]
            token, logprob = writer.choose(rows[row])
            if token in writer.end_tokens:
                finished[branch] = "stop"
                continue
            tokens[branch], logprobs[branch] = token, logprob
            written[branch] += 1
            if writer.ended(token):
                finished[branch] = "stop"
            elif written[branch] >= writer.max_new_tokens:
                finished[branch] = "length"
        for branch in _beyond(layout, [branch for branch in row_of if not finished[branch]], context_length):
            finished[branch] = "length"
        yield Column(tuple(tokens), tuple(finished), tuple(logprobs))
        live = [branch for branch in row_of if not finished[branch]]
        if not live:
            return
        layout = layout.append([token if branch in live else None for branch, token in enumerate(tokens)])
        rows = forward(backend, layout, len(live), cache)
        row_of = {branch: row for row, branch in enumerate(live)}


def read_prompts(backend: Backend, layout: Layout, cache: KVCache, begin: int = 0) -> Floats:
    """Logits ``[N, V]`` of the last token of every branch, after all of ``layout`` from slot ``begin`` on went into
    ``cache``, which holds what stands before.

    Long prompts are read in pieces: nobody sees a token that stands behind him before decoding begins.
    """
    found: dict[int, Floats] = {}
    for start in range(begin, len(layout), PIECE):
        stop = min(start + PIECE, len(layout))
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


def _beyond(layout: Layout, live: Sequence[int], context_length: int) -> Sequence[int]:
    """Those of the ``live`` branches whose next token has no position left."""
    if layout.visibility == "isolated":
        return [branch for branch in live if layout.times[layout.last[branch]] + 2 > context_length]
    return live if len(layout) + len(live) > context_length else ()


def _check_finite(logits: Floats) -> None:
    """Raises:
    InputError: something overflowed, so that any token would be as good as another.
    """
    if not np.isfinite(logits.sum(axis=-1)).all():
        raise InputError("the model gives logits that are not finite; use --dtype bfloat16 or float32")


def _capacity(layout: Layout, writers: Sequence[Writer], context_length: int) -> int:
    """Tokens that the sequence can have at most; in columns every token takes a position of its own."""
    left = [context_length - 1 - int(layout.times[slot]) for slot in layout.last]
    tokens = len(layout) + sum(min(w.max_new_tokens, room) for w, room in zip(writers, left, strict=True))
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
