"""GPTQ: the output error is smaller than after rounding, and nothing else about the format changes."""

import pytest
import torch

from pos2d.exporter.quantisation import gptq
from pos2d.exporter.quantisation.blockwise import SEARCHED_SPANS, dequantise, quantise
from pos2d.exporter.quantisation.gptq import HessianFactors, factorise_hessian, quantise_with_gptq, split_into_groups
from tests.bounds import gamma

BITS = (4, 8)
Tensor = torch.Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_inputs(columns: int) -> Tensor:
    """Correlated inputs ``[512, columns]`` of very different magnitudes."""
    mixed = normal(512, columns // 4, seed=1) @ normal(columns // 4, columns, seed=2)
    return (mixed + 0.3 * normal(512, columns, seed=3)) * normal(columns, seed=4).exp()


def hessian_of(inputs: Tensor) -> HessianFactors:
    groups = split_into_groups(inputs)
    return factorise_hessian(groups.transpose(1, 2) @ groups, inputs.shape[1])


def most_rows_agree(found: Tensor, expected: Tensor) -> bool:
    """Tell whether nine rows in ten agree up to rounding.

    Kernels add in different orders, so a value halfway between two steps may be rounded to either side, and the
    compensation changes the rest of its row.
    """
    bound = 4 * gamma(found.shape[1], torch.float32)
    return float(torch.isclose(found, expected, rtol=bound, atol=0).all(1).float().mean()) >= 0.9


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("columns", "block_size"), [(128, 32), (200, 64), (72, 16), (300, 128)])
def test_the_output_error_is_less_than_after_rounding(bits: int, columns: int, block_size: int) -> None:
    weight, inputs = normal(96, columns), layer_inputs(columns)

    def output_error(packed: Tensor, scales: Tensor) -> float:
        return float((inputs @ (dequantise(packed, scales, bits, columns) - weight).T).square().sum())

    compensated = quantise_with_gptq(weight, bits, block_size, hessian_of(inputs))
    for spans in ((2.0 ** (bits - 1),), SEARCHED_SPANS[bits]):
        rounded = quantise(weight, bits, block_size, spans)
        assert [part.shape for part in compensated] == [part.shape for part in rounded]
        assert [part.dtype for part in compensated] == [part.dtype for part in rounded]
        assert output_error(*compensated) < 0.5 * output_error(*rounded)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [96, 100])
def test_uncorrelated_inputs_give_the_rounded_weights(bits: int, columns: int) -> None:
    """No column can compensate another one: only the scale search remains."""
    weight = normal(64, columns)
    q, scales = quantise_with_gptq(weight, bits, 32, factorise_hessian(torch.eye(columns)[None], columns))
    expected_q, expected_scales = quantise(weight, bits, 32, SEARCHED_SPANS[bits])
    # Two sums over its block change a scale by up to a half, and each side adds them up in a different order.
    torch.testing.assert_close(scales, expected_scales, rtol=4 * gamma(32 + 4, torch.float32), atol=0)
    # Both searches compare sums whose last digits differ, and a value may lie halfway between two steps.
    assert (q != expected_q).float().mean() < 1e-3


def test_columns_with_larger_inputs_have_less_error() -> None:
    weight = normal(64, 128)
    diagonal = torch.ones(128)
    diagonal[:8] = 1000.0
    hessian = factorise_hessian(diagonal.diag()[None], 128)
    error = (dequantise(*quantise_with_gptq(weight, 4, 128, hessian), 4, 128) - weight).square().mean(0)
    rounding_error = (dequantise(*quantise(weight, 4, 128, SEARCHED_SPANS[4]), 4, 128) - weight).square().mean(0)
    assert error[:8].mean() < rounding_error[:8].mean()


@pytest.mark.parametrize("bits", BITS)
def test_rows_do_not_depend_on_each_other(bits: int) -> None:
    weight, hessian = normal(40, 160), hessian_of(layer_inputs(160))
    whole = dequantise(*quantise_with_gptq(weight, bits, 32, hessian), bits, 160)
    parts = [dequantise(*quantise_with_gptq(part, bits, 32, hessian), bits, 160) for part in torch.split(weight, 13)]
    assert most_rows_agree(torch.cat(parts), whole)


def test_column_groups_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gives what it gives alone, also where the columns are no multiple of its length."""
    monkeypatch.setattr(gptq, "MAX_GROUP_COLUMNS", 300)
    weight, inputs = normal(32, 650), layer_inputs(652)[:, :650]
    hessian = hessian_of(inputs)
    assert hessian.inverse_factors.shape == (3, 256, 256)
    whole = dequantise(*quantise_with_gptq(weight, 4, 32, hessian), 4, 650)
    for number, columns in enumerate((slice(0, 256), slice(256, 512), slice(512, 650))):
        length = len(range(650)[columns])
        alone = HessianFactors(hessian.diagonal[columns], hessian.inverse_factors[number, None, :length, :length])
        expected = dequantise(*quantise_with_gptq(weight[:, columns], 4, 32, alone), 4, length)
        assert most_rows_agree(whole[:, columns], expected)


def test_the_factor_is_the_upper_cholesky_factor_of_the_inverse_hessian() -> None:
    inputs = layer_inputs(96).double()
    hessian = (inputs.T @ inputs).float()
    factor = factorise_hessian(hessian[None], 96).inverse_factors[0].double()
    assert torch.equal(factor, factor.triu())
    damped = hessian.double() / hessian.diagonal().double().mean() + gptq.DAMPING * torch.eye(96)
    inverse = factor.T @ factor
    # The two factors were rounded to float32, and so was the mean, by which the damping is not divided.
    bound = gamma(3, torch.float32) * (factor.T.abs() @ factor.abs() @ damped.abs())
    bound += gamma(96, torch.float32) * (torch.eye(96) + gptq.DAMPING * inverse.abs())
    assert ((inverse @ damped - torch.eye(96)).abs() <= bound).all()


def test_inputs_and_weights_may_be_all_zeros() -> None:
    weight = normal(8, 64)
    weight[:, :32] = 0.0
    for inputs in (torch.zeros(16, 64), torch.cat([layer_inputs(64)[:, :48], torch.zeros(512, 16)], dim=1)):
        packed, scales = quantise_with_gptq(weight, 4, 16, hessian_of(inputs))
        stored = dequantise(packed, scales, 4, 64)
        assert stored.isfinite().all()
        assert not stored[:, :32].any()
        assert (stored - weight)[:, 32:].abs().max() < 1.0
