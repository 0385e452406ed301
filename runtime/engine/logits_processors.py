"""What changes a row of logits before a token is drawn: pure functions over float ``[V]``; -inf is never drawn.

They do what transformers' processors of the same names do, and are applied in the same order.
"""

from collections.abc import Collection

import numpy as np

from pos2d.runtime.engine.backend import Floats


def penalise_repetition(logits: Floats, seen: Collection[int], penalty: float) -> Floats:
    """Tokens that were ``seen`` become less likely: positive logits are divided by ``penalty``, others multiplied."""
    tokens = np.fromiter(seen, dtype=np.int64, count=len(seen))
    changed = logits.copy()
    found = logits[tokens]
    changed[tokens] = np.where(found < 0, found * penalty, found / penalty)
    return changed


def forbid(logits: Floats, tokens: Collection[int]) -> Floats:
    changed = logits.copy()
    changed[list(tokens)] = -np.inf
    return changed


def keep_top_k(logits: Floats, k: int) -> Floats:
    """The ``k`` largest, and whatever is as large as the last of them."""
    if k >= len(logits):
        return logits
    least = np.partition(logits, -k)[-k]
    return np.where(logits < least, -np.inf, logits)


def keep_top_p(logits: Floats, p: float) -> Floats:
    """The fewest of the likeliest tokens that together have a probability of ``p``."""
    ids = np.flatnonzero(np.isfinite(logits))
    ids = ids[np.argsort(logits[ids], kind="stable")]  # the least likely first
    dropped = ids[np.cumsum(probabilities(logits[ids])) <= 1 - p]
    return forbid(logits, dropped[: len(ids) - 1])


def keep_min_p(logits: Floats, p: float) -> Floats:
    """Tokens at least ``p`` times as likely as the likeliest."""
    return np.where(logits < logits.max() + np.log(p), -np.inf, logits)


def probabilities(logits: Floats) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    """softmax, in float64."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    scaled: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = weights / weights.sum()
    return scaled


def log_probability(logits: Floats, token: int) -> float:
    """log softmax of one token."""
    shifted = logits.astype(np.float64) - logits.max()
    return float(shifted[token] - np.log(np.exp(shifted).sum()))
