"""How much the beginnings of sequences have in common."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of items, or characters, that two sequences of one type have in common from their beginning."""
    if second[: len(first)] == first:  # the usual case, compared without a loop of ours
        return len(first)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
