"""The state of one sequence that is being written: which branches live, what they chose, where their tokens stand."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from pos2d.errors import InputError
from pos2d.layout import Layout
from pos2d.runtime.engine.backend import Floats

FinishReason = Literal["stop", "length"]


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


class Decoding:
    """``layout`` grows by a token for every branch of ``live`` with every column.

    A branch that draws an end token stops; that token belongs to no column and is not fed. A branch ends with
    ``length`` after its writer's most tokens, or when its next token would pass ``context_length`` positions; columnar
    branches share these, so that all end at once.

    Raises:
        InputError: the prompts alone are longer than ``context_length``.
    """

    def __init__(self, layout: Layout, writers: Sequence[Writer], context_length: int) -> None:
        check_length(layout, context_length)
        self.layout = layout
        self.live = list(range(len(layout.last)))
        self._writers, self._context_length = writers, context_length
        self._finished: list[FinishReason | None] = [None] * len(self.live)
        self._written = [0] * len(self.live)

    @property
    def capacity(self) -> int:
        """Tokens that the sequence can have at most; in columns every token takes a position of its own."""
        layout, length = self.layout, self._context_length
        left = [length - 1 - int(layout.times[slot]) for slot in layout.last]
        tokens = len(layout) + sum(min(w.max_new_tokens, room) for w, room in zip(self._writers, left, strict=True))
        return tokens if layout.visibility == "isolated" else min(tokens, max(length, len(layout)))

    def take(self, logits: Floats) -> Column:
        """Choose from logits ``[N, V]`` of the newest token of every live branch.

        Raises:
            InputError: logits that are not finite.
        """
        _check_finite(logits)
        tokens: list[int | None] = [None] * len(self._finished)
        logprobs: list[float | None] = [None] * len(self._finished)
        for branch, row in zip(self.live, logits, strict=True):
            writer = self._writers[branch]
            token, logprob = writer.choose(row)
            if token in writer.end_tokens:
                self._finished[branch] = "stop"
                continue
            tokens[branch], logprobs[branch] = token, logprob
            self._written[branch] += 1
            if writer.ended(token):
                self._finished[branch] = "stop"
            elif self._written[branch] >= writer.max_new_tokens:
                self._finished[branch] = "length"
        for branch in self._beyond([branch for branch in self.live if not self._finished[branch]]):
            self._finished[branch] = "length"
        self.live = [branch for branch in self.live if not self._finished[branch]]
        self.layout = self.layout.append([t if branch in self.live else None for branch, t in enumerate(tokens)])
        return Column(tuple(tokens), tuple(self._finished), tuple(logprobs))

    def _beyond(self, live: Sequence[int]) -> Sequence[int]:
        """Those of the ``live`` branches whose next token has no position left."""
        layout, length = self.layout, self._context_length
        if layout.visibility == "isolated":
            return [branch for branch in live if layout.times[layout.last[branch]] + 2 > length]
        return live if len(layout) + len(live) > length else ()


def span(layout: Layout) -> int:
    """Positions that the sequence takes; no layout has a time above its largest position."""
    return 1 + int(layout.positions.max())


def check_length(layout: Layout, context_length: int) -> None:
    if span(layout) > context_length:
        raise InputError(
            f"the prompts take {span(layout)} positions, the model has {context_length}; "
            "shorten them or ask fewer at once"
        )


def _check_finite(logits: Floats) -> None:
    """Raises:
    InputError: something overflowed, so that any token would be as good as another.
    """
    if not np.isfinite(logits.sum(axis=-1)).all():
        raise InputError(
            "the model gives logits that are not finite; use --dtype bfloat16 or float32, or export it again so"
        )
