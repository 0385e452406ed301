"""Logits processors: pure functions from logits ``[V]`` to logits ``[V]``; a token at -inf is never sampled.

Each computes what the transformers processor of the same purpose computes. :mod:`pos2d.runtime.engine.sampler` has
their order.
"""

from collections.abc import Collection

import numpy as np

from pos2d.runtime.engine.backend import Floats


def penalise_repetition(logits: Floats, tokens: Collection[int], penalty: float) -> Floats:
    """Make ``tokens`` less likely: positive logits are divided by ``penalty``, negative ones multiplied by it."""
    ids = np.fromiter(tokens, dtype=np.int64, count=len(tokens))
    processed = logits.copy()
    scores = logits[ids]
    processed[ids] = np.where(scores < 0, scores * penalty, scores / penalty)
    return processed


def suppress(logits: Floats, tokens: Collection[int]) -> Floats:
    """Set the logits of ``tokens`` to -inf."""
    processed = logits.copy()
    processed[list(tokens)] = -np.inf
    return processed


def apply_temperature(logits: Floats, temperature: float) -> Floats:
    """Divide by ``temperature``, which is above 0."""
    scaled: Floats = logits / np.float32(temperature)
    return scaled


def keep_top_k(logits: Floats, k: int) -> Floats:
    """Keep the ``k`` largest logits, and those that equal the smallest of them."""
    if k >= len(logits):
        return logits
    smallest = np.partition(logits, -k)[-k]
    return np.where(logits < smallest, -np.inf, logits)


def keep_top_p(logits: Floats, p: float) -> Floats:
    """Keep the smallest set of most likely tokens whose probabilities add up to ``p``."""
    ids = np.flatnonzero(np.isfinite(logits))
    ids = ids[np.argsort(logits[ids], kind="stable")]  # ascending
    dropped = ids[np.cumsum(probabilities(logits[ids])) <= 1 - p]
    return suppress(logits, dropped[: len(ids) - 1])


def keep_min_p(logits: Floats, p: float) -> Floats:
    """Keep tokens whose probability is at least ``p`` times that of the most likely token."""
    return np.where(logits < logits.max() + np.log(p), -np.inf, logits)


def probabilities(logits: Floats) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    """Softmax in float64, ``[V]``."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    normalised: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = weights / weights.sum()
    return normalised


def log_probability(logits: Floats, token: int) -> float:
    """Log softmax of one token, in float64."""
    shifted = logits.astype(np.float64) - logits.max()
    return float(shifted[token] - np.log(np.exp(shifted).sum()))
