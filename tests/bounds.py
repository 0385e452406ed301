"""Error bounds that follow from the number of roundings and the type, and so hold on any processor.

The bounds are those of Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, sections 2.2 and 3.1.
They hold for every order of summation, with and without fused multiply-adds.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch

# Relative to the largest logit. Float32 logits of these models, which have two layers, differ by up to 2.5e-6 from
# kernel to kernel; a wrong position, mask or scale changes them by 1e-2 and more.
LOGITS = 2.0**-15
# A logit passes through about twenty roundings to a 16-bit type in each of two layers.
HALF_ROUNDINGS = 40
# The mean of random draws may be off by so many standard errors; by chance one in two million is off by more.
SIGMAS = 5


def gamma(roundings: int, dtype: torch.dtype) -> float:
    """Return the largest relative error of so many successive roundings: ``n * u / (1 - n * u)``.

    A sum of n products has n roundings: one of a product and n - 1 of additions.
    """
    share = roundings * torch.finfo(dtype).eps / 2
    return share / (1 - share)


def in_turn(*shares: float) -> float:
    """Return the relative error of operations in turn that have these relative errors."""
    return prod(1 + share for share in shares) - 1


def sum_bound(roundings: int, dtype: torch.dtype, magnitude: torch.Tensor) -> torch.Tensor:
    """Return the bound on the error of a sum of products; ``magnitude`` is ``sum |x_i * w_i|``."""
    return magnitude * gamma(roundings, dtype)


def logits_bound(expected: Any, dtype: torch.dtype = torch.float32) -> float:
    """Return the bound on the error of logits, an array or a tensor, when activations have type ``dtype``."""
    share = LOGITS if dtype == torch.float32 else gamma(HALF_ROUNDINGS, dtype)
    return share * float(abs(expected).max())


def rounded_once(
    found: torch.Tensor, exact: torch.Tensor, slack: torch.Tensor, nearest: Callable[[torch.Tensor], torch.Tensor]
) -> bool:
    """Tell whether ``found`` is a sum rounded once, when ``exact`` is that sum up to ``slack``.

    A sum close to the middle of two neighbours may be rounded to either one, because kernels add in different orders.
    """
    odd = found != nearest(exact)
    low, high = (nearest((exact + side * slack)[odd]) for side in (-1, 1))
    return bool(((low <= found[odd]) & (found[odd] <= high)).all())
