"""The search for the positions with the lowest loss: all ratios, then strides of the best, then more text for the best.

Scoring every ratio with every stride would take too long. The ratios are compared at the trainer's stride, and the best
of them at all strides. Where another stride than the trainer's wins, all ratios are compared at that one too, because
with a wrong stride the right ratio can be worse than a wrong one. All of this takes one sequence of the text. The best
candidates, and the branches as separate sequences, are then scored on the other sequences, until it is decided which
is best or the time is over.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pos2d.exporter.inspection.pace import Scorer
from pos2d.exporter.inspection.position_grid import STRIDES, ratios_with, strides_of
from pos2d.exporter.inspection.ranking import SIGNIFICANT, Floats, finalists, paired_difference
from pos2d.exporter.inspection.samples import Sample, first_branches
from pos2d.progress import Progress
from pos2d.spec import Rope2DSpec

Losses = dict[Rope2DSpec, Floats]

# The ratios whose strides are tried: those tied with the best, within these numbers.
LEAST_RATIOS, MOST_RATIOS = 2, 3
# The candidates that are scored on more text, and how many of them at least on few branches, whose spread says little.
LEAST_FINALISTS, LEAST_AT_FIRST, MOST_FINALISTS = 2, 4, 6
# A difference of this many standard errors decides before the end of the text, from this many branches on.
DECISIVE, DECISIVE_BRANCHES = 4.0, 12
# The share of the time that the first sequence may take; it has fewer branches if it would take more.
SCREENING_SHARE = 0.6
# Candidates that are scored however slow the machine is: no 2D RoPE, and the two most usual ratios.
LEAST_CANDIDATES = 3


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Summed losses ``[branches]`` of the candidates and of ``separate`` sequences.

    They are in the order of ``samples``, those that were scored, and shorter for candidates that were dropped before
    the last.
    """

    losses: Losses
    separate: Floats
    samples: tuple[Sample, ...]

    @property
    def best_2d(self) -> Rope2DSpec:
        """The best candidate with 2D RoPE of those that were scored on all samples."""
        whole = {spec: values for spec, values in self.losses.items() if len(values) == len(self.separate)}
        return _best(_with_2d_rope(whole))


def token_counts(samples: Iterable[Sample]) -> Floats:
    """Number of predicted tokens of every branch of all samples, ``[branches]``."""
    return np.array([len(b.ids) - b.start for sample in samples for b in sample.branches], dtype=np.float64)


def search(scorer: Scorer, separate: Rope2DSpec, samples: Sequence[Sample]) -> Found:
    """Score candidates for a model of ``separate.num_frequencies`` frequencies; ``separate`` has isolated branches."""
    first = _sample_for_screening(scorer, separate, samples[0])
    on_separate = scorer.losses(separate, first)
    losses = _screened(scorer, first, separate.num_frequencies)
    return _compared(scorer, losses, separate, on_separate, [first, *samples[1:]])


def _sample_for_screening(scorer: Scorer, separate: Rope2DSpec, sample: Sample) -> Sample:
    """``sample``, with fewer branches where the machine is so slow that all would take too long, but with two."""
    passes = 1 + len(ratios_with(separate.num_frequencies, STRIDES[0])) + LEAST_RATIOS * len(STRIDES)
    most = scorer.pace.tokens_left * SCREENING_SHARE / passes
    counts = range(len(sample.branches), 1, -1)
    fitting = next((n for n in counts if len(first_branches(sample, n)) <= most), 2)
    scorer.pace.cut = scorer.pace.cut or fitting < len(sample.branches)
    return first_branches(sample, fitting)


def _screened(scorer: Scorer, sample: Sample, frequencies: int) -> Losses:
    """Losses on one sequence, of all candidates that are worth a pass."""
    losses: Losses = {}
    counts = token_counts([sample])

    def score(specs: Sequence[Rope2DSpec], progress: Progress) -> None:
        for spec in specs:
            if spec not in losses and (len(losses) < LEAST_CANDIDATES or scorer.pace.allows(len(sample))):
                losses[spec] = np.array(scorer.losses(spec, sample))
            progress.advance()

    coarse = [Rope2DSpec(frequencies, ()), *ratios_with(frequencies, STRIDES[0])]
    others = len(STRIDES) - 1
    with Progress("step 2 of 3, screening candidates", len(coarse) + MOST_RATIOS * others, long=True) as progress:
        score(coarse, progress)
        ratios = finalists(_with_2d_rope(losses), counts, LEAST_RATIOS, MOST_RATIOS)
        for spec in ratios:
            score(strides_of(spec)[1:], progress)
        progress.advance((MOST_RATIOS - len(ratios)) * others)
    while missing := _beside_the_best(losses, counts):
        known = len(losses)
        with Progress("step 2 of 3, screening further candidates", len(missing), long=True) as progress:
            score(missing, progress)
        if len(losses) == known:  # the time is over
            break
    return losses


def _with_2d_rope(losses: Losses) -> Losses:
    return {spec: values for spec, values in losses.items() if spec.pair_indices}


def _best(losses: Losses) -> Rope2DSpec:
    return min(losses, key=lambda spec: float(losses[spec].sum()))


def _beside_the_best(losses: Losses, counts: Floats) -> list[Rope2DSpec]:
    """Candidates without a loss that share ratio or stride with the best one.

    Those that share its stride are left out if that does not matter: if the trainer's stride is as good.
    """
    best = _best(_with_2d_rope(losses))
    row, column = strides_of(best), ratios_with(best.num_frequencies, best.branch_stride)
    usual = losses.get(row[0])
    if usual is not None:
        difference, error = paired_difference(usual, losses[best], counts)
        column = column if difference > SIGNIFICANT * error else []
    return [spec for spec in (*row, *column) if spec not in losses]


def _compared(
    scorer: Scorer, losses: Losses, separate: Rope2DSpec, on_separate: Sequence[float], samples: Sequence[Sample]
) -> Found:
    """Score the best candidates and separate sequences on one sample after the other."""
    alone, done = np.array(on_separate), 1
    with Progress("step 3 of 3, comparing the best on more sequences", len(samples) - 1, long=True) as progress:
        for sample in samples[1:]:
            counts = token_counts(samples[:done])
            whole = {spec: values for spec, values in losses.items() if len(values) == len(counts)}
            if _is_decided(whole, alone, counts):
                break
            field = _finalists(whole, alone, counts)
            added = _round(scorer, [*field, separate], sample)
            if added is None:
                break
            losses = losses | {spec: np.append(losses[spec], added[spec]) for spec in field}
            alone, done = np.append(alone, added[separate]), done + 1
            progress.advance()
    return Found(losses, alone, tuple(samples[:done]))


def _round(scorer: Scorer, specs: Sequence[Rope2DSpec], sample: Sample) -> dict[Rope2DSpec, list[float]] | None:
    """Losses of all ``specs`` on one sample, or None if the time does not suffice for all of them."""
    added: dict[Rope2DSpec, list[float]] = {}
    for spec in specs:
        if not scorer.pace.allows(len(sample) * (len(specs) - len(added))):
            return None
        added[spec] = scorer.losses(spec, sample)
    return added


def _finalists(whole: Losses, alone: Floats, counts: Floats) -> list[Rope2DSpec]:
    """Those to score on more text: few where separate sequences are far better, but one with 2D RoPE."""
    least, most = LEAST_FINALISTS if len(counts) >= DECISIVE_BRANCHES else LEAST_AT_FIRST, MOST_FINALISTS
    if all(_is_far(values, alone, counts) for values in whole.values()):
        least = most = LEAST_FINALISTS
    field = finalists(whole, counts, least, most)
    best = _best(_with_2d_rope(whole))
    return field if best in field else [*field, best]


def _is_decided(whole: Losses, alone: Floats, counts: Floats) -> bool:
    """Whether separate sequences are far better than every candidate, or one candidate than all others and they."""
    if len(counts) < DECISIVE_BRANCHES:
        return False
    if all(_is_far(values, alone, counts) for values in whole.values()):
        return True
    best = _best(whole)
    others = [values for spec, values in whole.items() if spec != best]
    return all(_is_far(values, whole[best], counts) for values in (alone, *others))


def _is_far(losses: Floats, lower: Floats, counts: Floats) -> bool:
    difference, error = paired_difference(losses, lower, counts)
    return difference > DECISIVE * error
