"""Where the greedy tokens of two engines part, and whether two logits that are as good as equal decided there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# Two logits so close may change places by the order in which another engine adds in float32.
TIE = 1e-3
# An engine that parts more often than this in one answer is not followed further.
MOST = 16


@dataclass(frozen=True, slots=True)
class Parting:
    """``position`` counts the tokens of the answer from 0; ``found`` is None where the answer ended before it.

    The logits are those of our model in float32, after the same tokens; None where there is no token. ``bits`` are
    those of the numbers with which the engine computes.
    """

    where: str
    position: int
    expected: int | None
    found: int | None
    expected_logit: float | None = None
    found_logit: float | None = None
    bits: int = 32

    @property
    def gap(self) -> float:
        """How far the two logits are from each other; infinite where one is missing."""
        if self.expected_logit is None or self.found_logit is None:
            return float("inf")
        return abs(self.expected_logit - self.found_logit)

    @property
    def limit(self) -> float:
        """Up to this gap the logits are as good as equal: in 16 bits, the distance of float16's numbers there."""
        if self.bits > 16 or self.expected_logit is None:
            return TIE
        return float(np.spacing(np.float16(abs(self.expected_logit))))

    @property
    def tied(self) -> bool:
        return self.gap <= self.limit


def first_difference(expected: Sequence[int], found: Sequence[int]) -> int | None:
    """The first place where two sequences differ, also by an end; None if they are equal."""
    for place, (left, right) in enumerate(zip(expected, found, strict=False)):
        if left != right:
            return place
    return None if len(expected) == len(found) else min(len(expected), len(found))


def part(
    where: str,
    expected: Sequence[int],
    found: Sequence[int],
    logits: Callable[[Sequence[int], list[int]], Sequence[float]],
    bits: int = 32,
) -> Parting | None:
    """The first parting of two answers; ``logits(said, tokens)`` are those of tokens after the beginning ``said``."""
    place = first_difference(expected, found)
    if place is None:
        return None
    left, right = (tokens[place] if place < len(tokens) else None for tokens in (expected, found))
    if left is None or right is None:
        return Parting(where, place, left, right)
    ours, theirs = logits(expected[:place], [left, right])
    return Parting(where, place, left, right, ours, theirs, bits)


def follow(
    where: str,
    expected: Sequence[int],
    ask: Callable[[Sequence[int]], Sequence[int]],
    logits: Callable[[Sequence[int], list[int]], Sequence[float]],
    bits: int = 32,
) -> tuple[int, list[Parting]]:
    """How many tokens of an answer are equal, and where it parts from ``expected``.

    ``ask(said)`` are the engine's tokens after the beginning ``said`` of the answer. After two tied logits it is asked
    again behind the expected token, so that one tie does not hide the rest; what comes after a real difference is not
    looked at, and does not count as equal.
    """
    partings: list[Parting] = []
    start = 0
    while start < len(expected):
        found = [*expected[:start], *ask(expected[:start])]
        parting = part(where, expected, found, logits, bits)
        if parting is None:
            break
        partings.append(parting)
        if not parting.tied or len(partings) == MOST:
            return parting.position - len(partings) + 1, partings
        start = parting.position + 1
    return len(expected) - len(partings), partings
