"""How far apart two computations of one value may be, from the number of roundings and the type, on any processor.

The bounds are those of Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, 2.2 and 3.1: they hold
whatever order a kernel adds in, with and without fused multiply-adds.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch

# Of the largest logit. Float32 logits of these models, two layers deep, differ by up to 2.5e-6 from kernel to kernel;
# a wrong position, mask or scale changes them by 1e-2 and more.
LOGITS = 2.0**-15
# Roundings to a half, one after the other, on the way to a logit: twenty in each of two layers.
HALVES_IN_TURN = 40
# Standard errors that the mean of draws may be off: by chance one in two million is more.
SIGMAS = 5


def gamma(roundings: int, dtype: torch.dtype) -> float:
    """What so many roundings in a row change at most, as a share: ``n * u / (1 - n * u)``.

    A sum of n products has n of them: that of the product, and n - 1 additions.
    """
    share = roundings * torch.finfo(dtype).eps / 2
    return share / (1 - share)


def in_turn(*shares: float) -> float:
    """What changes by these shares, one after the other, come to."""
    return prod(1 + share for share in shares) - 1


def sum_bound(roundings: int, dtype: torch.dtype, magnitude: torch.Tensor) -> torch.Tensor:
    """How far a computed sum of products may be from the exact one; ``magnitude`` is ``sum |x_i * w_i|``."""
    return magnitude * gamma(roundings, dtype)


def logits_bound(expected: Any, dtype: torch.dtype = torch.float32) -> float:
    """How far logits, an array or a tensor, may be from ``expected`` where activations have type ``dtype``."""
    share = LOGITS if dtype == torch.float32 else gamma(HALVES_IN_TURN, dtype)
    return share * float(abs(expected).max())


def rounded_once(
    found: torch.Tensor, exact: torch.Tensor, slack: torch.Tensor, nearest: Callable[[torch.Tensor], torch.Tensor]
) -> bool:
    """Whether ``found`` is what rounding makes of a sum that float64 gives up to ``slack``: of a value beside the
    middle of two neighbours another order of summation may take the other one."""
    odd = found != nearest(exact)
    low, high = (nearest((exact + side * slack)[odd]) for side in (-1, 1))
    return bool(((low <= found[odd]) & (found[odd] <= high)).all())
