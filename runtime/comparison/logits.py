"""Logits of one model after the other on the same tokens, and their distances from those of the unmerged model."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from pos2d.errors import InputError
from pos2d.layout import build_layout
from pos2d.progress import Progress
from pos2d.runtime.comparison.texts import forced
from pos2d.runtime.engine.backend import Floats
from pos2d.runtime.engine.decode import forward, forward_slots, prefill
from pos2d.runtime.evaluation.parity import Doubles, kl_divergence, log_softmax
from pos2d.runtime.evaluation.sequences import EvalSequence
from pos2d.runtime.model.model import Model
from pos2d.spec import Rope2DSpec

# New tokens of the answer whose time is taken, after one that is not.
TIMED_TOKENS = 24
# Logits of which float64 copies are made at a time: 32 MB each.
PIECE = 2**22
# How much farther than the adapter moves them logits may move beside that, for its strength to be read from them.
MOST_BESIDE = 3


@dataclass(frozen=True, slots=True)
class Distance:
    """A model on ``tokens`` predicted tokens: its perplexity, and its distance from the unmerged model.

    ``mean_kl`` is KL(unmerged || model) in nats a token, and ``top1_agreement`` the share of tokens with the same top
    token. Of the unmerged model itself, they are 0 and 1.
    """

    tokens: int
    perplexity: float
    mean_kl: float
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class Parting:
    """The first token at which the greedy answers to a prompt part; all tokens before ``step`` (from 0) are the same.

    ``expected`` is the token of the unmerged model and ``token`` that of the artifact. The logits of both are those of
    the unmerged model, and of the artifact, in this order.
    """

    prompt: int
    step: int
    expected: str
    token: str
    unmerged_logits: tuple[float, float]
    artifact_logits: tuple[float, float]


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """A greedy answer of the unmerged model: its tokens, the last of which may be an end token, and their logits."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logits: Floats


def logits_of(model: Model, sequence: EvalSequence) -> Floats:
    """Logits float32 ``[R, V]`` of a sequence's rows, in their order; the sequence is read in chunks.

    Raises:
        InputError: they are not finite.
    """
    length = len(sequence.layout)
    cache = model.backend.new_cache(length)
    result: Floats | None = None
    for start in range(0, length, model.backend.prefill_chunk):
        stop = min(start + model.backend.prefill_chunk, length)
        chosen = (sequence.rows >= start) & (sequence.rows < stop)
        rows = sequence.rows[chosen] - start
        # A chunk that predicts nothing still goes into the cache, and a pass has logits of at least one token.
        asked = rows if rows.size else np.array([0])
        logits = forward_slots(model.backend, sequence.layout, start, stop, cache, asked)
        if result is None:
            result = np.empty((len(sequence.rows), logits.shape[-1]), dtype=np.float32)
        if rows.size:
            result[chosen] = logits
    assert result is not None
    if not np.isfinite(result).all():
        raise InputError(f"{model.path} gives logits that are not finite for this text; make it again")
    return result


def measured(
    model: Model, sequences: Sequence[EvalSequence], expected: Sequence[Floats], progress: Progress
) -> Distance | None:
    """The distance of a model from ``expected``, logits of the same targets; None without sequences."""
    sums = np.zeros(3)
    tokens = 0
    for sequence, reference in zip(sequences, expected, strict=False):
        sums += _sums(reference, logits_of(model, sequence), sequence)
        tokens += len(sequence.targets)
        progress.advance()
    return _distance(sums, tokens)


def of_itself(sequences: Sequence[EvalSequence], logits: Sequence[Floats]) -> Distance | None:
    """The distance of the unmerged model from itself, with its perplexity."""
    pairs = list(zip(sequences, logits, strict=True))
    sums = sum((_sums(values, values, sequence) for sequence, values in pairs), np.zeros(3))
    return _distance(sums, sum(len(sequence.targets) for sequence in sequences))


def _distance(sums: Doubles, tokens: int) -> Distance | None:
    if not tokens:
        return None
    nll, kl, same = (sums / tokens).tolist()
    return Distance(tokens, float(np.exp(nll)), max(kl, 0.0), same)


def _sums(expected: Floats, actual: Floats, sequence: EvalSequence) -> Doubles:
    """Sums over the targets, float64 ``[3]``: negative log-likelihood, KL, and how many top tokens are the same."""
    sums = np.zeros(3)
    start = 0
    for reference, values in _in_pieces(expected, actual):
        targets = sequence.targets[start : start + len(values)]
        wide = log_softmax(values)
        nll = -wide[np.arange(len(targets)), targets].sum()
        same = (reference.argmax(-1) == values.argmax(-1)).sum()
        sums += np.array([nll, kl_divergence(log_softmax(reference), wide).sum(), same])
        start += len(values)
    return sums


def _in_pieces(*logits: Floats) -> Iterator[tuple[Floats, ...]]:
    """A few rows at a time of arrays ``[R, V]``, since float64 copies of all would take much memory.

    A padded or a resized vocabulary has further columns, which are left out.
    """
    width = min(values.shape[-1] for values in logits)
    rows = max(1, PIECE // width)
    for start in range(0, len(logits[0]), rows):
        yield tuple(values[start : start + rows, :width] for values in logits)


def answered(model: Model, prompt: tuple[int, ...], spec: Rope2DSpec, new_tokens: int) -> Answer:
    """The greedy answer of the unmerged model, up to an end token, with the logits of every step."""
    layout = build_layout([prompt], spec)
    cache = model.backend.new_cache(len(layout) + new_tokens)
    logits = [prefill(model.backend, layout, cache)[0]]
    tokens = [int(logits[0].argmax())]
    while len(tokens) < new_tokens and tokens[-1] not in model.manifest.eos_token_ids:
        layout = layout.append([tokens[-1]])
        logits.append(forward(model.backend, layout, 1, cache)[0])
        tokens.append(int(logits[-1].argmax()))
    return Answer(prompt, tuple(tokens), np.stack(logits))


def followed(model: Model, answer: Answer, spec: Rope2DSpec) -> Floats:
    """Logits ``[T, V]`` of a model that is fed the answer of the unmerged one."""
    logits = logits_of(model, forced(answer.prompt, answer.tokens, spec))
    return logits[:, : answer.logits.shape[-1]]


def parting(number: int, answer: Answer, logits: Floats, tokenizer: Any) -> Parting | None:
    """Where a model's greedy answer to prompt ``number`` parts from that of the unmerged one; None if it does not."""
    parts = np.flatnonzero(logits.argmax(-1) != np.array(answer.tokens))
    if not parts.size:
        return None
    step = int(parts[0])
    expected, token = answer.tokens[step], int(logits[step].argmax())
    pairs = [(float(values[step, expected]), float(values[step, token])) for values in (answer.logits, logits)]
    words = [str(tokenizer.decode([word])) for word in (expected, token)]
    return Parting(number, step, words[0], words[1], pairs[0], pairs[1])


def strength_of(base: Sequence[Floats], unmerged: Sequence[Floats], model: Sequence[Floats]) -> float | None:
    """How far logits moved from the base's towards those of the unmerged model: 0 not at all, 1 as far, 2 twice.

    Least squares over all logits ``[R, V]``, without what is the same for all tokens of a row. None where they moved
    much farther in other directions, as a weak adapter under coarse quantisation makes them, so that it says nothing.
    """
    along = length = distance = 0.0
    for arrays in zip(base, unmerged, model, strict=True):
        for start, trained, found in _in_pieces(*arrays):
            change = trained.astype(np.float64) - start
            change -= change.mean(-1, keepdims=True)
            moved = found.astype(np.float64) - start
            moved -= moved.mean(-1, keepdims=True)
            along += float((change * moved).sum())
            length += float(np.square(change).sum())
            distance += float(np.square(moved).sum())
    beside = distance - along**2 / length if length else 1.0
    return along / length if beside <= MOST_BESIDE**2 * length else None


def kl_by_step(answers: Sequence[Answer], logits: Sequence[Floats]) -> tuple[float, ...]:
    """KL(unmerged || model) at every step of the answers, the mean of those that reach it."""
    each = [
        kl_divergence(log_softmax(answer.logits), log_softmax(values))
        for answer, values in zip(answers, logits, strict=True)
    ]
    steps = max(map(len, each), default=0)
    return tuple(float(np.mean([kl[step] for kl in each if step < len(kl)])) for step in range(steps))


def tokens_per_second(model: Model, prompt: Sequence[int]) -> float:
    """Tokens a second of one greedy answer, by the median time of a step."""
    marks = [time.perf_counter()]
    room = model.manifest.context_length - len(prompt)
    for _ in model.stream_ids([list(prompt)], max_new_tokens=max(1, min(TIMED_TOKENS, room)), ignore_eos=True):
        marks.append(time.perf_counter())
    steps = [after - before for before, after in pairwise(marks)]
    return 1 / statistics.median(steps[1:] or steps)
