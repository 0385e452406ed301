"""Errors that are made up for: smaller where the inputs see them, and nothing else changed."""

import pytest
import torch

from pos2d.exporter.quantisation import gptq
from pos2d.exporter.quantisation.blockwise import SEARCHED, dequantise, quantise
from pos2d.exporter.quantisation.gptq import Curvature, curvature_of, in_panels, quantise_compensated

BITS = (4, 8)
Tensor = torch.Tensor


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(columns: int) -> Tensor:
    """Inputs that depend on one another, of very different sizes."""
    mixed = drawn(512, columns // 4, seed=1) @ drawn(columns // 4, columns, seed=2)
    return (mixed + 0.3 * drawn(512, columns, seed=3)) * drawn(columns, seed=4).exp()


def curvature(read: Tensor) -> Curvature:
    panels = in_panels(read)
    return curvature_of(panels.transpose(1, 2) @ panels, read.shape[1])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("columns", "block"), [(128, 32), (200, 64), (72, 16), (300, 128)])
def test_what_the_inputs_see_is_less_than_after_rounding(bits: int, columns: int, block: int) -> None:
    values, read = drawn(96, columns), inputs(columns)

    def seen(packed: Tensor, scales: Tensor) -> float:
        return float((read @ (dequantise(packed, scales, bits, columns) - values).T).square().sum())

    compensated = quantise_compensated(values, bits, block, curvature(read))
    for steps in ((2.0 ** (bits - 1),), SEARCHED[bits]):
        rounded = quantise(values, bits, block, steps)
        assert [part.shape for part in compensated] == [part.shape for part in rounded]
        assert [part.dtype for part in compensated] == [part.dtype for part in rounded]
        assert seen(*compensated) < 0.5 * seen(*rounded)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [96, 100])
def test_inputs_that_know_nothing_of_each_other_are_rounded(bits: int, columns: int) -> None:
    """There is nothing to make up with: what is left is the search for scales."""
    values = drawn(64, columns)
    found = quantise_compensated(values, bits, 32, curvature_of(torch.eye(columns)[None], columns))
    expected = quantise(values, bits, 32, SEARCHED[bits])
    torch.testing.assert_close(found[1], expected[1])
    # The search decides by sums whose last digits differ, and a value may stand halfway.
    assert (found[0] != expected[0]).float().mean() < 1e-3


def test_columns_that_are_seen_more_are_kept_better() -> None:
    values = drawn(64, 128)
    power = torch.ones(128)
    power[:8] = 1000.0
    known = curvature_of(power.diag()[None], 128)
    error = (dequantise(*quantise_compensated(values, 4, 128, known), 4, 128) - values).square().mean(0)
    plain = (dequantise(*quantise(values, 4, 128, SEARCHED[4]), 4, 128) - values).square().mean(0)
    assert error[:8].mean() < plain[:8].mean()


@pytest.mark.parametrize("bits", BITS)
def test_rows_do_not_depend_on_each_other(bits: int) -> None:
    values, known = drawn(40, 160), curvature(inputs(160))
    whole = dequantise(*quantise_compensated(values, bits, 32, known), bits, 160)
    parts = [dequantise(*quantise_compensated(part, bits, 32, known), bits, 160) for part in torch.split(values, 13)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_panels_make_up_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is what it would be alone, also where columns are no multiple of their length."""
    monkeypatch.setattr(gptq, "PANEL", 300)
    values, read = drawn(32, 650), inputs(652)[:, :650]
    known = curvature(read)
    assert known.factors.shape == (3, 256, 256)
    whole = dequantise(*quantise_compensated(values, 4, 32, known), 4, 650)
    for number, here in enumerate((slice(0, 256), slice(256, 512), slice(512, 650))):
        width = len(range(650)[here])
        alone = Curvature(known.power[here], known.factors[number, None, :width, :width])
        expected = dequantise(*quantise_compensated(values[:, here], 4, 32, alone), 4, width)
        torch.testing.assert_close(whole[:, here], expected)


def test_factors_are_of_the_inverse() -> None:
    """What GPTQ is made with: upper, and its square is the inverse of the damped moments."""
    read = inputs(96).double()
    moments = (read.T @ read).float()
    factor = curvature_of(moments[None], 96).factors[0].double()
    assert torch.equal(factor, factor.triu())
    damped = moments.double() / moments.diagonal().double().mean() + gptq.DAMPING * torch.eye(96)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(96).double(), atol=1e-3, rtol=0)


def test_inputs_and_weights_of_nothing_but_zeros() -> None:
    values = drawn(8, 64)
    values[:, :32] = 0.0
    for read in (torch.zeros(16, 64), torch.cat([inputs(64)[:, :48], torch.zeros(512, 16)], dim=1)):
        packed, scales = quantise_compensated(values, 4, 16, curvature(read))
        stored = dequantise(packed, scales, 4, 64)
        assert stored.isfinite().all()
        assert not stored[:, :32].any()
        assert (stored - values)[:, 32:].abs().max() < 1.0
