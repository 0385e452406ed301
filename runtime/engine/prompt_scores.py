"""Log probabilities of tokens that are given, such as those of a prompt, from the logits of the tokens before them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pos2d.runtime.engine.backend import Floats
from pos2d.runtime.engine.logits_processors import most_likely
from pos2d.runtime.engine.sequence import TopTokens

# Float64 values at once: 32 MiB each for the logits and their exponentials.
BLOCK_VALUES = 1 << 22


@dataclass(frozen=True, slots=True)
class TokenScores:
    """For every token: its log probability, the most likely tokens in its place, and whether it is the greedy one."""

    logprobs: tuple[float, ...]
    top: tuple[TopTokens, ...]
    is_greedy: tuple[bool, ...]


def score_tokens(logits: Floats, next_tokens: Sequence[int], top: int = 0) -> TokenScores:
    """Score the token that follows each of S consecutive slots.

    ``logits`` are ``[S, V]`` and ``next_tokens`` ``[S]``: of a layout with one branch, the logits of slot i belong to
    the token in slot i + 1. ``top`` is the number of most likely tokens, best first. The numbers are, bit by bit, those
    that :class:`pos2d.runtime.engine.sampler.Sampler` records for the same logits.
    """
    tokens = np.asarray(next_tokens, dtype=np.int64)
    if logits.shape[:1] != tokens.shape:
        raise ValueError(f"{len(tokens)} tokens for logits of {len(logits)} slots")
    best = [most_likely(row, top) if top else [] for row in logits]
    found: list[list[float]] = []
    size = max(1, BLOCK_VALUES // max(1, logits.shape[-1]))
    for first in range(0, len(tokens), size):
        block = slice(first, first + size)
        wanted = np.column_stack([tokens[block], np.array(best[block], dtype=np.int64)])
        found += _log_probabilities(logits[block], wanted)
    return TokenScores(
        logprobs=tuple(values[0] for values in found),
        top=tuple(tuple(zip(ids, values[1:], strict=True)) for ids, values in zip(best, found, strict=True)),
        is_greedy=tuple((logits.argmax(axis=-1) == tokens).tolist()),
    )


def _log_probabilities(logits: Floats, ids: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]") -> list[list[float]]:
    """Log softmax of logits ``[S, V]`` at ``ids`` ``[S, K]``, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(shifted, ids, axis=-1)
    normalisers = np.log(np.exp(shifted, out=shifted).sum(axis=-1, keepdims=True))
    found: list[list[float]] = (chosen - normalisers).tolist()
    return found
