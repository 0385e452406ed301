"""How far a quantised graph is from the exact model, whose predictions for held-out tokens travel in the artifact."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pos2d.manifest import Manifest
from pos2d.reference import Prediction, Reference
from pos2d.runtime.engine.backend import Floats
from pos2d.runtime.engine.decode import forward_slots
from pos2d.runtime.engine.spans import batch_cache, forward_spans
from pos2d.runtime.evaluation.parity import Doubles
from pos2d.runtime.model.model import Model

# The largest mean KL and the smallest share of equal top tokens of a new artifact, by the fewest bits of its layers. A
# graph with wrong positions is further away than this; a model that is so much changed by its bits is of no use.
LIMITS = {8: (0.1, 0.8), 4: (1.5, 0.2)}
# What another processor or release may add to the figures that the export recorded.
KL_SHARE, KL_MARGIN, TOP1_MARGIN = 1.25, 0.01, 0.05
# Logits in memory at a time.
MAX_LOGITS = 2**23
BATCH, BATCH_TOKENS = "both in one batch", 96


@dataclass(frozen=True, slots=True)
class CaseDistance:
    """Distances over ``positions`` tokens: the share with the same top token, and KL(exact || artifact) in nats."""

    name: str
    positions: int
    top1_agreement: float
    mean_kl: float


@dataclass(frozen=True, slots=True)
class ExactDistance:
    """The distance to the exact model in each case, the worst figures, and their limits.

    ``is_text``: the tokens are text; otherwise they are random.
    """

    min_top1: float
    max_mean_kl: float
    passed: bool
    top1_agreement: float
    mean_kl: float
    is_text: bool
    cases: tuple[CaseDistance, ...]


def distance_in_sequence(model: Model, prediction: Prediction) -> CaseDistance:
    """Read one sequence in chunks, with a cache, in the cheapest graph that can compute its branches."""
    layout = prediction.held_out.layout(model.manifest.rope_2d)
    model.backend.expect_branches(len(layout.last))
    cache = model.backend.new_cache(len(layout))
    sums = np.zeros(2)
    for start, stop in _chunks(model, len(layout)):
        logits = forward_slots(model.backend, layout, start, stop, cache)
        sums += _sums(prediction, slice(start, stop), logits)
    return CaseDistance(prediction.held_out.name, len(layout), *(sums / len(layout)).tolist())


def distance_in_batch(model: Model, predictions: Sequence[Prediction]) -> CaseDistance:
    """Read the first :data:`BATCH_TOKENS` tokens of all sequences at the same time, in the batch graph."""
    backend = model.backend
    layouts = [prediction.held_out.layout(model.manifest.rope_2d) for prediction in predictions]
    lengths = [min(len(layout), BATCH_TOKENS) for layout in layouts]
    cache = batch_cache(backend, len(layouts))
    sums = np.zeros(2)
    for start, stop in _chunks(model, max(lengths), len(layouts)):
        spans = [(min(start, length), min(stop, length)) for length in lengths]
        logits = forward_spans(backend, layouts, spans, cache, [range(*span) for span in spans])
        for prediction, span, rows in zip(predictions, spans, logits, strict=True):
            sums += _sums(prediction, slice(*span), rows)
    return CaseDistance(BATCH, sum(lengths), *(sums / sum(lengths)).tolist())


def judged(manifest: Manifest, reference: Reference, cases: Sequence[CaseDistance]) -> ExactDistance:
    """Judge the distances by what the export recorded in the manifest, or by the limits of a new artifact."""
    recorded = (manifest.parity or {}).get("exact")
    assert manifest.graph_quant is not None
    max_kl, min_top1 = LIMITS[min(manifest.graph_quant.bits.values())]
    if recorded is not None:
        max_kl = KL_SHARE * recorded["mean_kl"] + KL_MARGIN
        min_top1 = recorded["top1_agreement"] - TOP1_MARGIN
    kl = float(np.max([case.mean_kl for case in cases]))  # numpy passes a NaN on, which never passes
    top1 = float(np.min([case.top1_agreement for case in cases]))
    return ExactDistance(
        min_top1=min_top1,
        max_mean_kl=max_kl,
        passed=kl <= max_kl and top1 >= min_top1,
        top1_agreement=top1,
        mean_kl=kl,
        is_text=reference.is_text,
        cases=tuple(cases),
    )


def _chunks(model: Model, length: int, sequences: int = 1) -> Iterator[tuple[int, int]]:
    size = min(model.backend.prefill_chunk, MAX_LOGITS // model.manifest.vocab_size) // sequences
    for start in range(0, length, max(1, size)):
        yield start, min(start + max(1, size), length)


def _sums(prediction: Prediction, slots: slice, logits: Floats) -> Doubles:
    """Sums over the tokens of ``slots``, float64 ``[2]``, from their logits ``[R, V]``: of equal top tokens, and of
    the KL of the distributions in which the tokens that are not stored count as one."""
    tokens, expected = prediction.tokens[slots], prediction.log_probs[slots].astype(np.float64)
    largest = logits.max(-1, keepdims=True)
    log_total = largest + np.log(np.exp(logits - largest).sum(-1, keepdims=True))
    actual = (np.take_along_axis(logits, tokens.astype(np.int64), axis=-1) - log_total).astype(np.float64)
    kl = (np.exp(expected) * (expected - actual)).sum(-1)
    if tokens.shape[1] < logits.shape[1]:
        rest, actual_rest = (np.maximum(1 - np.exp(stored).sum(-1), 1e-12) for stored in (expected, actual))
        kl += rest * np.log(rest / actual_rest)
    same_top = logits.argmax(-1) == tokens[:, 0]
    return np.array([same_top.sum(), kl.sum()])
