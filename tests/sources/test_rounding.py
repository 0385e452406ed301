"""One rounding from float64: to the nearest value, or to one of the two around it so that the mean is exact."""

from fractions import Fraction
from math import copysign, isfinite

import pytest
import torch

from pos2d.sources.tensors.rounding import Rounding, is_finite, round_nearest, round_stochastic
from tests.bounds import SIGMAS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]


def nearest(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """By the definition: of a value's neighbours the nearest, by exact fractions; of two equally near the even one."""
    guess = exact.float().to(dtype)
    bits = guess.view({2: torch.int16, 4: torch.int32}[guess.element_size()]).flatten()
    result = bits.clone()
    for place, value in enumerate(exact.flatten().tolist()):
        patterns = torch.stack([bits[place] - 1, bits[place], bits[place] + 1])
        values = patterns.view(dtype).double().tolist()
        distances = [
            (abs(Fraction(near) - Fraction(value)), int(pattern) & 1, pattern)
            for near, pattern in zip(values, patterns, strict=True)
            if isfinite(near) and copysign(1, near) == copysign(1, value)
        ]
        result[place] = min(distances, key=lambda choice: choice[:2])[2]
    return result.view(dtype).reshape(exact.shape)


def hard_cases(dtype: torch.dtype) -> torch.Tensor:
    """Values a hair beside half-way points, half-way points themselves, subnormals, and ordinary ones."""
    draw = torch.Generator().manual_seed(3)
    ordinary = torch.randn(400, generator=draw, dtype=torch.float64)
    small = ordinary * float(torch.finfo(dtype).tiny)
    values = torch.cat([ordinary, small]).to(dtype)
    bits = {2: torch.int16, 4: torch.int32}[values.element_size()]
    above = (values.view(bits) + 1).view(dtype).double()
    middle = (values.double() + above) / 2
    hair = middle.abs() * 2.0**-40
    return torch.cat([ordinary, small, middle, middle + hair, middle - hair])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_is_nearest_even_beside_half_way_points(dtype: torch.dtype) -> None:
    exact = hard_cases(dtype)
    expected = nearest(exact, dtype)
    assert torch.equal(round_nearest(exact.reshape(50, -1), dtype), expected.reshape(50, -1))
    if dtype != torch.float32:
        assert not torch.equal(exact.to(dtype), expected)  # torch's own way rounds twice


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_gives_a_neighbour_and_keeps_what_is_exact(dtype: torch.dtype) -> None:
    exact = hard_cases(dtype)
    draw = torch.Generator().manual_seed(0)
    near = round_nearest(exact, dtype).double()
    rounded = round_stochastic(exact, dtype, draw).double()
    step = (round_stochastic(exact, dtype, draw).double() - near).abs().amax()
    assert step > 0
    assert ((rounded == near) | ((rounded - exact) * (near - exact) < 0) | (rounded - exact == -(near - exact))).all()
    held = near[:400]
    assert torch.equal(round_stochastic(held, dtype, draw).double(), held)


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_is_right_on_average(dtype: torch.dtype) -> None:
    """The mean of n draws lies within its standard errors; a draw's is at most half the distance of the neighbours."""
    count = 20_000
    for value in (1.0 + 2.0**-13, -0.3, 3.1e-5, 7e-8 if dtype == torch.float16 else 1e-39):
        exact = torch.full((count,), value, dtype=torch.float64)
        rounded = round_stochastic(exact, dtype, torch.Generator().manual_seed(1)).double()
        low, high = rounded.min(), rounded.max()
        assert low <= value <= high
        assert abs(float(rounded.mean()) - value) < SIGMAS * float(high - low) / 2 / count**0.5


def test_stochastic_depends_on_seed_and_name_only() -> None:
    exact = torch.randn(3, 1000, dtype=torch.float64)
    first, again, other_seed, other_name = (
        Rounding("stochastic", seed).of(name)(exact, torch.bfloat16)
        for seed, name in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other_seed)
    assert not torch.equal(first, other_name)


@pytest.mark.parametrize("rounded", [round_nearest, Rounding("stochastic", 0).of("a")])
def test_too_large_values_become_infinite_and_not_large(rounded: object) -> None:
    assert callable(rounded)
    assert rounded(torch.tensor([1e39, -70000.0], dtype=torch.float64), torch.float16).isinf().all()
    assert rounded(torch.tensor([1e39], dtype=torch.float64), torch.bfloat16).isinf().all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_finite_means_neither_nan_nor_infinite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values = torch.tensor([0.0, -0.0, 1.5, largest, -largest, torch.finfo(dtype).tiny], dtype=dtype)
    assert is_finite(values)
    for bad in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        for place in range(len(values)):
            copy = values.clone()
            copy[place] = bad
            assert not is_finite(copy)
