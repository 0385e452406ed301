"""Which of the positions that were tried has the lowest loss, and which others the text cannot tell from it.

Losses are compared as paired differences: two candidates on the same branches. A difference of at most two standard
errors can be chance, and such candidates are *tied*.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pos2d.exporter.inspection.position_grid import DEFAULT_STRIDE, distinct_ratios
from pos2d.sources.positions import DEFAULT_RATIO
from pos2d.spec import Rope2DSpec

Floats = npt.NDArray[np.float64]

# A difference is significant beyond this many standard errors.
SIGNIFICANT = 2.0


@dataclass(frozen=True, slots=True)
class Score:
    """The loss of one candidate, in nats per token.

    ``pairs`` frequencies are rotated by branch and time; without 2D RoPE there are none, and no ratio and no stride.
    ``difference`` is the loss minus the lowest loss on the same ``tokens``, with its ``standard_error``. The candidate
    is ``tied`` with the lowest if that is at most two standard errors.
    """

    ratio: float | None
    pairs: int
    branch_stride: int | None
    tokens: int
    loss: float
    difference: float
    standard_error: float
    tied: bool


@dataclass(frozen=True, slots=True)
class Guess:
    """The scores of all candidates on one text, and what they say.

    ``scores`` are of parallel branches: first those on the whole text, the lowest loss first.
    ``separate`` scores every branch as a sequence by itself, without 2D RoPE.
    ``best`` has the lowest loss, or is the trainer's default if that is tied with it; ``merge_flags`` are its flags.
    ``separate_is_better``: the loss of ``separate`` is below the lowest by more than two standard errors. Then the base
    model matters more than the training, and nothing is clear.
    ``ratio_is_clear``: no other ratio is tied; ``stride_is_clear``: no other stride of the best ratio is.
    ``tokens`` counts the tokens that were predicted.
    """

    best: Score
    merge_flags: str
    ratio_is_clear: bool
    stride_is_clear: bool
    separate_is_better: bool
    scores: tuple[Score, ...]
    separate: Score
    frequencies: int
    sequences: int
    branches: int
    tokens: int
    seconds: float


def paired_difference(losses: Floats, reference: Floats, counts: Floats) -> tuple[float, float]:
    """Mean of ``losses - reference`` per token, and its standard error.

    All arguments are ``[branches]``: summed losses, and numbers of tokens. The tokens of one branch depend on each
    other, branches hardly do, so this is a ratio estimate with the branch as the sampling unit.
    """
    differences, units = losses - reference, len(counts)
    mean = float(differences.sum() / counts.sum())
    squares = float(((differences - mean * counts) ** 2).sum()) * units / (units - 1)
    return mean, squares**0.5 / float(counts.sum())


def finalists(losses: Mapping[Rope2DSpec, Floats], counts: Floats, least: int, most: int) -> list[Rope2DSpec]:
    """The candidates that are tied with the lowest loss, lowest first, but at least ``least`` and at most ``most``."""
    ordered = sorted(losses, key=lambda spec: float(losses[spec].sum()))
    differences = [paired_difference(losses[spec], losses[ordered[0]], counts) for spec in ordered]
    tied = sum(difference <= SIGNIFICANT * error for difference, error in differences)
    return ordered[: min(max(tied, least), most)]


def rank(
    losses: Mapping[Rope2DSpec, Floats], separate: Floats, counts: Floats, *, sequences: int, seconds: float
) -> Guess:
    """Compare all candidates.

    ``losses`` are summed losses ``[branches]``, of the first branches only for candidates that were no finalists.
    ``separate`` has those of separate branches, and ``counts`` the tokens of every branch.
    """
    lowest = min((values for values in losses.values() if len(values) == len(counts)), key=np.sum)
    scores = [_score(spec, values, lowest, counts) for spec, values in losses.items()]
    scores.sort(key=lambda score: (-score.tokens, score.difference))
    some_spec = next(iter(losses))
    apart = _score(Rope2DSpec(some_spec.num_frequencies, ()), separate, lowest, counts)
    best = choose(scores)
    ties = [score for score in scores if score.tied]
    separate_is_better = -apart.difference > SIGNIFICANT * apart.standard_error
    tied_strides = {score.branch_stride for score in ties if score.pairs == best.pairs}
    return Guess(
        best=best,
        merge_flags=merge_flags(best),
        ratio_is_clear=not separate_is_better and all(score.pairs == best.pairs for score in ties),
        stride_is_clear=not separate_is_better and tied_strides == {best.branch_stride},
        separate_is_better=separate_is_better,
        scores=tuple(scores),
        separate=apart,
        frequencies=some_spec.num_frequencies,
        sequences=sequences,
        branches=len(counts),
        tokens=int(counts.sum()),
        seconds=seconds,
    )


def _score(spec: Rope2DSpec, losses: Floats, lowest: Floats, counts: Floats) -> Score:
    """Compare one candidate with the lowest loss, on the branches that it was scored on."""
    scored = len(losses)
    tokens = counts[:scored]
    difference, error = paired_difference(losses, lowest[:scored], tokens)
    pairs = len(spec.pair_indices)
    ratio_of_pairs = {count: ratio for ratio, count in distinct_ratios(spec.num_frequencies).items()}
    return Score(
        ratio=ratio_of_pairs.get(pairs),
        pairs=pairs,
        branch_stride=spec.branch_stride if pairs else None,
        tokens=int(tokens.sum()),
        loss=float(losses.sum() / tokens.sum()),
        difference=difference,
        standard_error=error,
        tied=difference <= SIGNIFICANT * error,
    )


def choose(scores: Sequence[Score]) -> Score:
    """The lowest loss, unless a default of the trainer is tied with it on the whole text.

    Of the tied ratios the default is taken, or else that of the lowest loss; then its strides are treated alike.
    """
    ties = [score for score in scores if score.tied and score.tokens == scores[0].tokens]
    of_ratio = [s for s in ties if s.ratio == DEFAULT_RATIO] or [s for s in ties if s.pairs == ties[0].pairs]
    return next((score for score in of_ratio if score.branch_stride == DEFAULT_STRIDE), of_ratio[0])


def merge_flags(score: Score) -> str:
    """The flags with which ``pos2d merge`` bakes these positions."""
    if not score.pairs:
        return "--no-patch-rope"
    return f"--rope-2d-ratio {score.ratio} --branch-stride {score.branch_stride}"
