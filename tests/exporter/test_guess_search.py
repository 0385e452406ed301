"""The search for positions within a limit of time, on losses and clocks that the tests make."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from pos2d.commands.shared.inspect_text import guess_lines
from pos2d.exporter.inspection.guess import one_thread_if_faster
from pos2d.exporter.inspection.pace import Pace, Scorer
from pos2d.exporter.inspection.position_grid import STRIDES, distinct_ratios, ratios_with, strides_of
from pos2d.exporter.inspection.ranking import Effort, Guess, compare_with_base, rank
from pos2d.exporter.inspection.samples import Sample
from pos2d.exporter.inspection.search import Found, search, token_counts
from pos2d.sources.files.parallel import limited_threads
from pos2d.spec import Rope2DSpec, pair_indices_for_ratio
from pos2d.text_samples import Branch

SEPARATE = Rope2DSpec(32, (), visibility="isolated")
SAMPLES = [Sample(tuple(Branch(tuple(range(20)), 10) for _ in range(4))) for _ in range(8)]
EFFORT = Effort(sequences=8, text_tokens=320, evaluated=0, cut=False, seconds=1.0)


class Machine:
    """Makes losses of nats per token, with noise between branches, in ``seconds`` of its own clock for each token."""

    def __init__(self, nats: Callable[[Rope2DSpec], float], seconds: float) -> None:
        self.nats, self.seconds, self.now = nats, seconds, 0.0

    def branch_losses(self, spec: Rope2DSpec, sample: Sample) -> list[float]:
        self.now += self.seconds * len(sample)
        return [10 * self.nats(spec) + noise for noise in (0.1, -0.1, 0.2, -0.2)[: len(sample.branches)]]

    def find(self, deadline: float = 100.0) -> tuple[Found, Pace]:
        pace = Pace(lambda: self.now, deadline)
        pace.add(1, self.seconds)
        return search(Scorer(self.branch_losses, pace), SEPARATE, SAMPLES), pace


def nats_with(ratio: float, stride: int, alone: float) -> Callable[[Rope2DSpec], float]:
    """Least for this ratio and stride; with another stride, the ratio is as bad as any."""
    pairs = pair_indices_for_ratio(32, ratio)

    def nats(spec: Rope2DSpec) -> float:
        if spec == SEPARATE:
            return alone
        wrong_stride = 1.0 + abs(STRIDES.index(spec.branch_stride) - STRIDES.index(stride))
        away = abs(len(spec.pair_indices) - len(pairs)) / 32
        return 1.0 + (min(away + 0.2, 1.0) if spec.branch_stride == stride else wrong_stride) * (
            spec.pair_indices != pairs or spec.branch_stride != stride
        )

    return nats


@pytest.mark.parametrize("ratio", distinct_ratios(32))
@pytest.mark.parametrize("stride", STRIDES)
def test_every_ratio_is_found_with_every_stride(ratio: float, stride: int) -> None:
    found, pace = Machine(nats_with(ratio, stride, alone=3.0), seconds=1e-4).find()
    best = found.best_2d
    assert (best.pair_indices, best.branch_stride) == (pair_indices_for_ratio(32, ratio), stride)
    assert not pace.cut


def test_the_speed_of_a_machine_does_not_matter_while_there_is_time() -> None:
    searches = [Machine(nats_with(0.5, 64, alone=3.0), seconds).find() for seconds in (1e-6, 1e-3, 5e-3)]
    (first, pace), *others = searches
    for found, other in others:
        assert found.samples == first.samples
        assert {spec: list(values) for spec, values in found.losses.items()} == {
            spec: list(values) for spec, values in first.losses.items()
        }
        assert (other.tokens, other.cut) == (pace.tokens, False)


@pytest.mark.parametrize("seconds", [0.03, 0.05, 0.1, 0.2, 0.4])
def test_a_slow_machine_scores_less_and_says_so(seconds: float) -> None:
    # Strides that cannot be told apart, so that nothing is decided early.
    machine = Machine(lambda spec: 1.0 + (len(spec.pair_indices) != 16) if spec != SEPARATE else 2.5, seconds)
    found, pace = machine.find()
    assert pace.cut
    assert machine.now <= 100.0
    assert len(found.best_2d.pair_indices) == 16
    assert sum(len(values) == len(found.separate) for values in found.losses.values()) > 1


def test_the_least_is_scored_in_no_time() -> None:
    found, pace = Machine(nats_with(1.0, 128, alone=3.0), seconds=50.0).find()
    assert pace.cut
    assert len(found.losses) == 3
    assert [len(sample.branches) for sample in found.samples] == [2]
    guess = rank(found.losses, found.separate, token_counts(found.samples), replace(EFFORT, cut=True))
    assert not guess.ratio_is_clear
    assert not guess.stride_is_clear
    text = "\n".join(guess_lines(guess, "trainer"))
    assert "20 of 320 tokens of the text and 3 candidates were scored" in text
    assert "no time to score every ratio" in text
    assert "no time to score every stride" in text


def test_what_is_decided_needs_no_more_text() -> None:
    found, pace = Machine(nats_with(0.5, 128, alone=0.001), seconds=1e-4).find()
    assert len(found.samples) == 3
    assert not pace.cut
    assert rank(found.losses, found.separate, token_counts(found.samples), EFFORT).winner == "ordinary"


@pytest.mark.parametrize(("one_is_faster", "asked"), [(True, None), (False, None), (True, 2)])
def test_one_thread_computes_where_several_are_slower(one_is_faster: bool, asked: int | None) -> None:
    before, machine = torch.get_num_threads(), Machine(lambda spec: 1.0, 0.0)

    def branch_losses(spec: Rope2DSpec, sample: Sample) -> list[float]:
        machine.now += torch.get_num_threads() if one_is_faster else 1 / torch.get_num_threads()
        return machine.branch_losses(spec, sample)

    scorer = Scorer(branch_losses, Pace(lambda: machine.now, 100.0))
    torch.set_num_threads(2)
    try:
        with limited_threads(asked) if asked else nullcontext(), one_thread_if_faster(scorer, SEPARATE, SAMPLES[0]):
            assert torch.get_num_threads() == (1 if one_is_faster and not asked else 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def guess_of(
    *,
    alone: float,
    columns: float,
    none: float = 4.0,
    base: tuple[float, float] | None = None,
    strides: Sequence[int] = STRIDES,
) -> Guess:
    """Ratio 0.5 has a loss of ``columns``, no 2D RoPE ``none``; ``base``: its loss alone and in columns."""
    counts, noise = np.full(8, 10.0), np.linspace(-0.5, 0.5, 8)
    half, *others = ratios_with(32, STRIDES[0])
    of = {Rope2DSpec(32, ()): none, half: columns} | dict.fromkeys(others, columns + 1)
    of |= dict.fromkeys((spec for spec in strides_of(half)[1:] if spec.branch_stride in strides), columns + 0.5)
    losses = {spec: counts * value + noise * value for spec, value in of.items()}
    separate = counts * alone + noise * alone
    learnt = None
    if base:
        base_alone, base_columns = (counts * value - noise for value in base)
        learnt = compare_with_base(separate, losses[half], base_alone, base_columns, counts)
    return rank(losses, separate, counts, EFFORT, learnt)


def test_the_winner_and_its_flags() -> None:
    rope, columnar = guess_of(alone=2.0, columns=1.0), guess_of(alone=2.0, columns=1.5, none=1.0)
    assert (rope.winner, rope.merge_flags) == ("2d rope", "--rope-2d-ratio 0.5 --branch-stride 128")
    assert rope.winner_is_clear
    assert (columnar.winner, columnar.merge_flags) == ("columnar", "--no-patch-rope")
    assert any("--visibility columnar" in line for line in guess_lines(columnar, "trainer"))
    tied = guess_of(alone=1.0, columns=1.0)
    assert (tied.winner, tied.winner_is_clear) == ("2d rope", False)
    assert any("not reliable" in line for line in guess_lines(tied, "trainer"))


@pytest.mark.parametrize(
    ("base", "clear", "words"),
    [
        ((3.0, 3.5), True, "learnt the text but nothing of such columns, as an ordinary adapter does"),
        ((3.0, 6.0), False, "if you know that it was trained on parallel branches, merge with --rope-2d-ratio 0.5"),
        ((0.9, 2.0), False, "nothing is known of its training"),
        (None, False, "no time to score the base"),
    ],
)
def test_ordinary_positions_win_and_the_base_says_how_sure_that_is(
    base: tuple[float, float] | None, clear: bool, words: str
) -> None:
    guess = guess_of(alone=1.0, columns=2.75, base=base)
    assert (guess.winner, guess.merge_flags, guess.best) == ("ordinary", "--no-patch-rope", guess.separate)
    assert guess.winner_is_clear is clear
    lines = guess_lines(guess, "trainer")
    assert "merge flags: --no-patch-rope" in lines
    assert words in lines[-1]
    assert "merge flags: --no-patch-rope (no flag is needed for an adapter of PEFT)" in guess_lines(guess, "peft")


def test_ordinary_positions_are_not_clear_where_candidates_are_missing() -> None:
    guess = guess_of(alone=1.0, columns=2.75, base=(3.0, 3.5), strides=(128, 64))
    assert (guess.winner, guess.complete, guess.winner_is_clear) == ("ordinary", False, False)
    assert "no time to score every ratio and stride" in guess_lines(guess, "trainer")[-1]
