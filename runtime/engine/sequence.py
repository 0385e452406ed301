"""The state of one sequence during decoding: its layout, its live branches, and why the others ended."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from pos2d.errors import InputError, UsageError
from pos2d.layout import Layout
from pos2d.manifest import Manifest
from pos2d.runtime.engine.backend import Floats

FinishReason = Literal["stop", "length", "cancelled"]
NO_BRANCHES = (
    "this artifact is for onnxruntime-genai and has one branch; ask for one answer at a time, or export again with "
    "`format='onnx'`"
)


# Token ids with their log probabilities, the most likely first.
TopTokens = tuple[tuple[int, float], ...]


class Choice(NamedTuple):
    """A token that was chosen; ``logprob`` and ``top_logprobs`` are None unless the options record them."""

    token: int
    logprob: float | None = None
    top_logprobs: TopTokens | None = None


class BranchSampler(Protocol):
    """Chooses the tokens of one branch, and decides where its answer ends."""

    end_tokens: Collection[int]
    max_new_tokens: int

    def choose(self, logits: Floats) -> Choice:
        """A token from logits ``[V]``, with the log probabilities that are recorded."""

    def append(self, token: int) -> bool:
        """Add a token to the answer; return whether the answer ends with it."""


@dataclass(frozen=True, slots=True)
class Column:
    """The result of one decode step, with one entry for each branch.

    ``tokens`` is None where a branch has ended; ``finished`` says why it ended, in this column and all later ones.
    """

    tokens: tuple[int | None, ...]
    finished: tuple[FinishReason | None, ...]
    logprobs: tuple[float | None, ...]
    top_logprobs: tuple[TopTokens | None, ...]


class SequenceState:
    """One sequence during decoding: with every column ``layout`` grows by one token for each branch in ``live``.

    A branch that samples an end token stops; that token is in no column and is not fed back. A branch ends with
    ``length`` after its sampler's ``max_new_tokens``, or when its next token would exceed ``context_length`` positions.
    Columnar branches share these positions, so all of them end at once.

    Raises:
        InputError: the prompts alone are longer than ``context_length``.
    """

    def __init__(self, layout: Layout, samplers: Sequence[BranchSampler], context_length: int) -> None:
        check_length(layout, context_length)
        self.layout = layout
        self.live = list(range(len(layout.last)))
        self._samplers, self._context_length = samplers, context_length
        self._finished: list[FinishReason | None] = [None] * len(self.live)
        # The layout before the newest column, and the tokens of that column which are to be fed.
        self._before: Layout | None = None
        self._newest: list[int | None] = []
        self._new_tokens = [0] * len(self.live)

    @property
    def capacity(self) -> int:
        """The most tokens that the sequence can have; in a columnar layout every token takes one position."""
        layout, length = self.layout, self._context_length
        room = [length - 1 - int(layout.times[slot]) for slot in layout.last]
        tokens = len(layout) + sum(
            min(sampler.max_new_tokens, positions) for sampler, positions in zip(self._samplers, room, strict=True)
        )
        return tokens if layout.visibility == "isolated" else min(tokens, max(length, len(layout)))

    def step(self, logits: Floats) -> Column:
        """Choose the next column from logits ``[N, V]`` of the newest token of every live branch.

        Raises:
            InputError: logits that are not finite.
        """
        _check_finite(logits)
        tokens: list[int | None] = [None] * len(self._finished)
        logprobs: list[float | None] = [None] * len(self._finished)
        top_logprobs: list[TopTokens | None] = [None] * len(self._finished)
        for branch, row in zip(self.live, logits, strict=True):
            sampler = self._samplers[branch]
            token, logprob, top = sampler.choose(row)
            if token in sampler.end_tokens:
                self._finished[branch] = "stop"
                continue
            tokens[branch], logprobs[branch], top_logprobs[branch] = token, logprob, top
            self._new_tokens[branch] += 1
            if sampler.append(token):
                self._finished[branch] = "stop"
            elif self._new_tokens[branch] >= sampler.max_new_tokens:
                self._finished[branch] = "length"
        for branch in self._out_of_positions([branch for branch in self.live if not self._finished[branch]]):
            self._finished[branch] = "length"
        self.live = [branch for branch in self.live if not self._finished[branch]]
        self._before, self._newest = self.layout, [t if k in self.live else None for k, t in enumerate(tokens)]
        self.layout = self._before.append(self._newest)
        return Column(tuple(tokens), tuple(self._finished), tuple(logprobs), tuple(top_logprobs))

    def cancel(self, branch: int) -> None:
        """End a branch between two steps: its newest token is not fed, and those before it stay visible to the others.

        A branch that has ended, or that does not exist, is left alone.
        """
        if branch not in self.live:
            return
        self._finished[branch] = "cancelled"
        self.live.remove(branch)
        if self._before is not None:
            self._newest[branch] = None
            self.layout = self._before.append(self._newest)

    def _out_of_positions(self, live: Sequence[int]) -> Sequence[int]:
        """The ``live`` branches whose next token has no position left."""
        layout, length = self.layout, self._context_length
        if layout.visibility == "isolated":
            return [branch for branch in live if layout.times[layout.last[branch]] + 2 > length]
        return live if len(layout) + len(live) > length else ()


def span(layout: Layout) -> int:
    """Number of positions that a layout takes; no time in it is above its largest position."""
    return 1 + int(layout.positions.max())


def check_length(layout: Layout, context_length: int) -> None:
    """Check that a layout fits the model.

    Raises:
        InputError: it takes more than ``context_length`` positions.
    """
    if span(layout) > context_length:
        raise InputError(
            f"the prompts take {span(layout)} positions, the model has {context_length}; "
            "shorten them or give fewer at once"
        )


def check_branches(manifest: Manifest, layouts: Sequence[Layout]) -> None:
    """Check that an artifact can compute the branches of these layouts.

    Raises:
        UsageError: a layout has several, and the artifact none.
    """
    if not manifest.has_branches and any(len(layout.last) > 1 for layout in layouts):
        raise UsageError(NO_BRANCHES)


def _check_finite(logits: Floats) -> None:
    """Check for an overflow, after which any token would be as good as another.

    Raises:
        InputError: a row has a value that is not finite.
    """
    if not np.isfinite(logits.sum(axis=-1)).all():
        raise InputError(
            "the model gives logits that are not finite; use `dtype` bfloat16 or float32, or export it with one of them"
        )
