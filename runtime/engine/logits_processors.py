"""Logits processors: pure functions from logits ``[V]`` to logits ``[V]``; a token at -inf is never sampled.

Each computes what the transformers processor of the same purpose computes. :mod:`pos2d.runtime.engine.sampler` has
their order.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pos2d.layout import Bools
from pos2d.runtime.engine.backend import Floats

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]
# Ids and biases of the tokens that may follow a beginning, by its length and its tokens.
Biases = Mapping[int, Mapping[tuple[int, ...], tuple[Array, Array]]]
NO_BIAS: tuple[Array, Array] = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
TOP_H_TOKENS = 100
# Tokens that are sorted first to find the most likely ones, and how far sums of probabilities may be wrong.
SORTED_TOKENS, UNCERTAIN = 512, 1e-9


def penalise_repetition(logits: Floats, tokens: Collection[int], penalty: float) -> Floats:
    """Make ``tokens`` less likely: positive logits are divided by ``penalty``, negative ones multiplied by it."""
    ids = np.fromiter(tokens, dtype=np.int64, count=len(tokens))
    processed = logits.copy()
    scores = logits[ids]
    processed[ids] = np.where(scores < 0, scores * penalty, scores / penalty)
    return processed


def penalise_frequency(logits: Floats, counts: Mapping[int, int], penalty: float) -> Floats:
    """Subtract ``penalty`` times its count from the logit of every token in ``counts``."""
    ids = np.fromiter(counts, dtype=np.int64, count=len(counts))
    times = np.fromiter(counts.values(), dtype=np.float32, count=len(counts))
    processed = logits.copy()
    processed[ids] -= np.float32(penalty) * times
    return processed


def penalise_presence(logits: Floats, tokens: Collection[int], penalty: float) -> Floats:
    """Subtract ``penalty`` from the logits of ``tokens``."""
    ids = np.fromiter(tokens, dtype=np.int64, count=len(tokens))
    processed = logits.copy()
    processed[ids] -= np.float32(penalty)
    return processed


def suppress(logits: Floats, tokens: Collection[int]) -> Floats:
    """Set the logits of ``tokens`` to -inf."""
    processed = logits.copy()
    processed[[token for token in tokens if token < len(logits)]] = -np.inf
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
    if not len(ids):
        return logits
    found = _likeliest(logits, ids, p) if len(ids) > SORTED_TOKENS else None
    if found is not None:
        return _only(logits, found)
    ids = ids[np.argsort(logits[ids], kind="stable")]  # ascending
    kept = np.cumsum(probabilities(logits[ids])) > 1 - p
    kept[-1:] = True
    return _only(logits, ids[kept])


def _likeliest(logits: Floats, ids: Array, p: float) -> Array | None:
    """The tokens that :func:`keep_top_p` keeps of ``ids``, from a sorted beginning, as sorting all of them takes long.

    None where that cannot tell, since a sum is so near to ``p`` that the order of its terms decides.
    """
    scores, count = logits[ids], SORTED_TOKENS
    weights = probabilities(scores)
    while count < len(ids):
        top = np.flatnonzero(scores >= np.partition(scores, -count)[-count])
        top = top[np.argsort(scores[top], kind="stable")][::-1]  # of equal ones, the larger id comes first
        sums = np.cumsum(weights[top])
        if np.abs(sums - p).min() < UNCERTAIN:
            return None
        if sums[-1] > p:
            found: Array = ids[top[: 1 + int((sums < p).sum())]]
            return found
        count *= 8
    return None


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
    return log_probabilities(logits, [token])[0]


def log_probabilities(logits: Floats, tokens: Sequence[int]) -> list[float]:
    """Log softmax of some tokens, in float64; ``logits`` are ``[V]``."""
    shifted = logits.astype(np.float64) - logits.max()
    found: list[float] = (shifted[tokens] - np.log(np.exp(shifted).sum())).tolist()
    return found


def most_likely(logits: Floats, count: int) -> list[int]:
    """The ``count`` tokens with the largest logits, best first; of equal ones, the token with the smaller id."""
    count = min(count, len(logits))
    smallest = np.partition(logits, -count)[-count]
    above, equal = np.flatnonzero(logits > smallest), np.flatnonzero(logits == smallest)
    best: list[int] = [*above[np.argsort(-logits[above], kind="stable")].tolist(), *equal.tolist()]
    return best[:count]


def keep_top_h(logits: Floats, share: float) -> Floats:
    """Keep the most likely tokens whose terms of the entropy add up to ``share`` of it, among the 100 most likely."""
    ids = np.argsort(-logits, kind="stable")[:TOP_H_TOKENS]
    ids = ids[logits[ids] > -np.inf]
    p = probabilities(logits[ids])
    terms = -p * np.log(p, where=p > 0, out=np.zeros_like(p))
    kept = np.cumsum(terms) <= share * terms.sum()
    kept[0] = True
    return _only(logits, ids[kept])


def keep_typical(logits: Floats, mass: float) -> Floats:
    """Keep the tokens whose surprise is nearest to the entropy, as many as it takes for a probability of ``mass``."""
    p = probabilities(logits)
    with np.errstate(divide="ignore"):
        surprise = -np.log(p)
    entropy = (p[p > 0] * surprise[p > 0]).sum()
    distance = np.abs(surprise - entropy)
    order = np.argsort(distance, kind="stable")
    last = min(int((np.cumsum(p[order]) < mass).sum()), len(p) - 1)
    return np.where(distance > distance[order[last]], -np.inf, logits)


def keep_above(logits: Floats, probability: float) -> Floats:
    """Keep tokens of at least ``probability``, and the most likely one."""
    return np.where((probabilities(logits) < probability) & (logits < logits.max()), -np.inf, logits)


def keep_eta(logits: Floats, epsilon: float) -> Floats:
    """Keep tokens above a probability that falls with the entropy and is at most ``epsilon``."""
    p = probabilities(logits)
    entropy = -(p * np.log(p, where=p > 0, out=np.zeros_like(p))).sum()
    return keep_above(logits, min(epsilon, float(np.sqrt(epsilon) * np.exp(-entropy))))


def repeating(sequence: Sequence[int], size: int, source: Sequence[int]) -> list[int]:
    """The tokens that would end ``sequence`` with ``size`` tokens that ``source`` has in the same order."""
    if len(source) < size or len(sequence) < size - 1:
        return []
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(source), size)
    ending = np.asarray(sequence[len(sequence) - size + 1 :], dtype=np.int64)
    found: list[int] = windows[(windows[:, :-1] == ending).all(axis=1), -1].tolist()
    return found


def add_biases(logits: Floats, sequence: Sequence[int], biases: Biases) -> Floats:
    """Add the bias of every sequence of tokens that ``sequence`` ends with, but for its last token, to that token."""
    biased = logits.copy()
    for length, endings in biases.items():
        if length <= len(sequence):
            ids, values = endings.get(tuple(sequence[len(sequence) - length :]), NO_BIAS)
            known = ids < len(logits)
            np.add.at(biased, ids[known], values[known])
    return biased


def biases_of(sequences: Iterable[tuple[Sequence[int], float]]) -> Biases:
    """The table that :func:`add_biases` takes: the tokens that may follow, by the length of what stands before them."""
    table: dict[int, dict[tuple[int, ...], tuple[list[int], list[float]]]] = {}
    for (*before, token), bias in sequences:
        ids, values = table.setdefault(len(before), {}).setdefault(tuple(before), ([], []))
        ids.append(token)
        values.append(bias)
    return {
        length: {
            before: (np.array(ids, dtype=np.int64), np.array(values, dtype=np.float32))
            for before, (ids, values) in endings.items()
        }
        for length, endings in table.items()
    }


def raise_end_tokens(logits: Floats, tokens: Collection[int], factor: float) -> Floats:
    """Add ``factor - 1`` times the size of their own logit to ``tokens``."""
    ids = np.array([token for token in tokens if np.isfinite(logits[token])], dtype=np.int64)
    processed = logits.copy()
    processed[ids] += np.abs(logits[ids]) * (factor - 1)
    return processed


def force(logits: Floats, tokens: Collection[int]) -> Floats:
    """Leave only ``tokens``, all equally likely."""
    forced = np.full_like(logits, -np.inf)
    forced[list(tokens)] = 0
    return forced


def keep_allowed(logits: Floats, allowed: Bools, unchanged: Floats) -> Floats:
    """Keep ``allowed`` tokens ``[V]``; where ``logits`` have none of them, those of ``unchanged``."""
    kept = np.where(allowed, logits, -np.inf)
    return kept if kept.max() > -np.inf else np.where(allowed, unchanged, -np.inf)


def _only(logits: Floats, ids: Array) -> Floats:
    kept = np.full_like(logits, -np.inf)
    kept[ids] = logits[ids]
    return kept
