"""Which of the positions that were tried has the lowest loss, and which others the text cannot tell from it.

Losses are compared as paired differences: two candidates on the same branches. A difference of at most two standard
errors can be chance, and such candidates are *tied*.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pos2d.exporter.inspection.position_grid import DEFAULT_STRIDE, STRIDES, distinct_ratios
from pos2d.sources.positions import DEFAULT_RATIO
from pos2d.spec import Rope2DSpec

Floats = npt.NDArray[np.float64]

# A difference is significant beyond this many standard errors. Beyond more, a candidate is scored no further.
SIGNIFICANT, POSSIBLE = 2.0, 3.0


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


# Which positions win: ``2d rope``, with a ratio and a stride; ``columnar``, parallel branches in columns without 2D
# RoPE; or ``ordinary``, every branch as a sequence by itself without 2D RoPE, as an ordinary LoRA is trained.
Winner = Literal["2d rope", "columnar", "ordinary"]


@dataclass(frozen=True, slots=True)
class Learnt:
    """What the adapter learnt, by four losses in nats per token on the same ``tokens``.

    ``alone`` and ``base_alone``: every branch as a sequence by itself, with and without the adapter. ``columns`` and
    ``base_columns``: in parallel, with the candidate with 2D RoPE that has the lowest loss.
    ``text``: alone, the adapter is significantly better than the base. ``parallel``: what columns cost, the difference
    of ``columns`` and ``alone``, is significantly less with the adapter than without.
    """

    alone: float
    columns: float
    base_alone: float
    base_columns: float
    text: bool
    parallel: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class Guess:
    """The scores of all candidates on one text, and what they say.

    ``winner`` names the positions to use, ``merge_flags`` their flags, and ``best`` their score. ``ordinary`` wins if
    ``separate`` is significantly better than the best candidate. Otherwise ``best`` is the candidate with the lowest
    loss, or the trainer's default if that is tied with it.
    ``winner_is_clear``: for ``ordinary``, the search is ``complete``, and the adapter learnt the text and nothing of
    columns, as ``learnt`` says; otherwise, ``separate`` is significantly worse than ``best``.
    ``ratio_is_clear``: no other ratio is tied; ``stride_is_clear``: no other stride of the best ratio is. Both are
    false where ``ordinary`` wins, and where the time did not suffice for all of them.

    ``scores`` are of parallel branches: first those on all of the text that was scored, the lowest loss first.
    ``best_2d`` is the best of them with 2D RoPE; ``complete``: every ratio was scored, and every stride of that one.
    ``separate`` scores every branch as a sequence by itself, without 2D RoPE. ``learnt`` compares with the base; None
    where ``ordinary`` does not win, or there was no time.

    ``tokens`` counts the tokens that were predicted, ``text_tokens`` those of the whole text, ``evaluated`` those of
    all forward passes. ``cut``: the limit of time left out text, branches or candidates.
    """

    winner: Winner
    merge_flags: str
    best: Score
    winner_is_clear: bool
    ratio_is_clear: bool
    stride_is_clear: bool
    scores: tuple[Score, ...]
    best_2d: Score
    complete: bool
    separate: Score
    learnt: Learnt | None
    frequencies: int
    sequences: int
    branches: int
    tokens: int
    text_tokens: int
    evaluated: int
    cut: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Effort:
    """What a search took: see the fields of :class:`Guess` with these names."""

    sequences: int
    text_tokens: int
    evaluated: int
    cut: bool
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
    """The candidates that may be as good as the one with the lowest loss, lowest first.

    The ``least`` with the lowest losses are always among them; they are at most ``most``.
    """
    ordered = sorted(losses, key=lambda spec: float(losses[spec].sum()))
    differences = {spec: paired_difference(losses[spec], losses[ordered[0]], counts) for spec in ordered[least:]}
    possible = [spec for spec, (difference, error) in differences.items() if difference <= POSSIBLE * error]
    return [*ordered[:least], *possible][:most]


def is_ordinary(losses: Mapping[Rope2DSpec, Floats], separate: Floats, counts: Floats) -> bool:
    """Whether separate sequences are significantly better than the best candidate, of those scored on all branches."""
    return _is_significant(_lowest(losses, len(counts)), separate, counts)


def _lowest(losses: Mapping[Rope2DSpec, Floats], branches: int) -> Floats:
    """Losses of the best candidate on the first ``branches``, of those that were scored on as many."""
    return min((values[:branches] for values in losses.values() if len(values) >= branches), key=np.sum)


def rank(
    losses: Mapping[Rope2DSpec, Floats], separate: Floats, counts: Floats, effort: Effort, learnt: Learnt | None = None
) -> Guess:
    """Compare all candidates.

    ``losses`` are summed losses ``[branches]``, of the first branches only for candidates that were dropped.
    ``separate`` has those of separate branches, and ``counts`` the tokens of every branch.
    """
    scores = [_score(spec, values, _lowest(losses, len(values)), counts) for spec, values in losses.items()]
    scores.sort(key=lambda score: (-score.tokens, score.difference))
    without = Rope2DSpec(next(iter(losses)).num_frequencies, ())
    apart = _score(without, separate, _lowest(losses, len(counts)), counts)
    ordinary = is_ordinary(losses, separate, counts)
    best, best_2d = choose(scores), choose([score for score in scores if score.pairs])
    ratio_is_clear, stride_is_clear = _clarity(best, scores, without.num_frequencies)
    complete = _has_all_ratios(scores, without.num_frequencies) and _has_all_strides(scores, best_2d)
    return Guess(
        winner="ordinary" if ordinary else "2d rope" if best.pairs else "columnar",
        merge_flags=merge_flags(apart if ordinary else best),
        best=apart if ordinary else best,
        winner_is_clear=(
            complete and learnt is not None and learnt.text and not learnt.parallel
            if ordinary
            else _is_significant(separate, _losses_of(best, losses), counts)
        ),
        ratio_is_clear=ratio_is_clear and not ordinary,
        stride_is_clear=stride_is_clear and not ordinary,
        scores=tuple(scores),
        best_2d=best_2d,
        complete=complete,
        separate=apart,
        learnt=learnt,
        frequencies=without.num_frequencies,
        sequences=effort.sequences,
        branches=len(counts),
        tokens=int(counts.sum()),
        text_tokens=effort.text_tokens,
        evaluated=effort.evaluated,
        cut=effort.cut,
        seconds=effort.seconds,
    )


def _is_significant(losses: Floats, lower: Floats, counts: Floats) -> bool:
    difference, error = paired_difference(losses, lower, counts)
    return difference > SIGNIFICANT * error


def _losses_of(score: Score, losses: Mapping[Rope2DSpec, Floats]) -> Floats:
    """The losses behind a score of :func:`rank`."""
    return next(
        values
        for spec, values in losses.items()
        if len(spec.pair_indices) == score.pairs and (not score.pairs or spec.branch_stride == score.branch_stride)
    )


def _clarity(best: Score, scores: Sequence[Score], frequencies: int) -> tuple[bool, bool]:
    """Whether the best ratio is the only one that is tied with the lowest loss, and whether its best stride is.

    Neither is clear where some of the ratios, or of the strides of the best one, were not scored.
    """
    ties = [score for score in scores if score.tied]
    tied_strides = {score.branch_stride for score in ties if score.pairs == best.pairs}
    return (
        _has_all_ratios(scores, frequencies) and all(score.pairs == best.pairs for score in ties),
        _has_all_strides(scores, best) and tied_strides == {best.branch_stride},
    )


def _has_all_ratios(scores: Sequence[Score], frequencies: int) -> bool:
    return {0, *distinct_ratios(frequencies).values()} == {score.pairs for score in scores}


def _has_all_strides(scores: Sequence[Score], best: Score) -> bool:
    return not best.pairs or {score.branch_stride for score in scores if score.pairs == best.pairs} == set(STRIDES)


def compare_with_base(
    alone: Floats, columns: Floats, base_alone: Floats, base_columns: Floats, counts: Floats
) -> Learnt:
    """What the adapter learnt, from summed losses ``[branches]`` of the same branches."""
    tokens = float(counts.sum())
    return Learnt(
        alone=float(alone.sum() / tokens),
        columns=float(columns.sum() / tokens),
        base_alone=float(base_alone.sum() / tokens),
        base_columns=float(base_columns.sum() / tokens),
        text=_is_significant(base_alone, alone, counts),
        parallel=_is_significant(base_columns - base_alone, columns - alone, counts),
        tokens=int(tokens),
    )


def _score(spec: Rope2DSpec, losses: Floats, lowest: Floats, counts: Floats) -> Score:
    """Compare one candidate with the lowest loss, both ``[branches]`` of those that it was scored on."""
    tokens = counts[: len(losses)]
    difference, error = paired_difference(losses, lowest, tokens)
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
    ties = [score for score in scores if score.tied and score.tokens == scores[0].tokens] or scores[:1]
    of_ratio = [s for s in ties if s.ratio == DEFAULT_RATIO] or [s for s in ties if s.pairs == ties[0].pairs]
    return next((score for score in of_ratio if score.branch_stride == DEFAULT_STRIDE), of_ratio[0])


def merge_flags(score: Score) -> str:
    """The flags with which ``pos2d merge`` bakes these positions."""
    if not score.pairs:
        return "--no-patch-rope"
    return f"--rope-2d-ratio {score.ratio} --branch-stride {score.branch_stride}"
