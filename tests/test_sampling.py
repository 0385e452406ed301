"""Draws follow softmax(logits / temperature), each branch from its own stream."""

import numpy as np
import pytest

from runtime.sampling import Sampler

LOGITS = np.array([1.0, 2.0, 0.0, -1.0], dtype=np.float32)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_the_softmax_at_that_temperature(temperature: float) -> None:
    sampler = Sampler(temperature, seed=7)
    count = 4000
    found = np.bincount([sampler.draw(LOGITS, 0) for _ in range(count)], minlength=4) / count
    expected = np.exp(LOGITS / temperature) / np.exp(LOGITS / temperature).sum()
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.03)


def test_temperature_0_takes_the_largest() -> None:
    assert {Sampler().draw(LOGITS, branch) for branch in range(50)} == {1}


def test_a_branch_draws_the_same_whatever_its_neighbours_draw() -> None:
    alone, among = Sampler(1.0), Sampler(1.0)
    expected = [alone.draw(LOGITS, 1) for _ in range(50)]
    found = []
    for _ in range(50):
        among.draw(LOGITS, 0)
        found.append(among.draw(LOGITS, 1))
    assert found == expected
    assert found != [Sampler(1.0).draw(LOGITS, 1) for _ in range(50)]
