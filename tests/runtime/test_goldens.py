"""Everything the trainer's own code computed, computed again from the artifacts."""

from collections.abc import Callable

import numpy as np
import pytest

from pos2d import runtime
from tests.bounds import logits_bound
from tests.conftest import BACKENDS, Golden

ModelOf = Callable[[Golden, str], runtime.Model]
TOLERANCE = 1e-4  # of logits up to 4: ten times what float32 gives, a hundredth of what a wrong position does


@pytest.fixture(params=BACKENDS)
def model(request: pytest.FixtureRequest, golden: Golden, model_of: ModelOf) -> runtime.Model:
    return model_of(golden, request.param)


def test_one_branch_has_the_trainers_logits(golden: Golden, model: runtime.Model) -> None:
    found = model.logits(golden.tensors["single.input_ids"])
    np.testing.assert_allclose(found, golden.tensors["single.logits"], rtol=0, atol=TOLERANCE)


def test_one_branch_has_the_trainers_greedy_ids(golden: Golden, model: runtime.Model) -> None:
    prompt = golden.tensors["single.input_ids"][0].tolist()
    expected = golden.facts["single_generated"]
    assert model.generate_ids([prompt], max_new_tokens=len(expected), ignore_eos=True) == [expected]


@pytest.mark.parametrize("layout", ["multi", "context"])
def test_branches_have_the_trainers_logits(golden: Golden, model: runtime.Model, layout: str) -> None:
    if f"{layout}.logits" not in golden.tensors:
        pytest.skip("the case has no branches")
    given = (golden.tensors[f"{layout}.{name}"] for name in ("input_ids", "position_ids", "pos2d"))
    np.testing.assert_allclose(model.logits(*given), golden.tensors[f"{layout}.logits"], rtol=0, atol=TOLERANCE)


def test_branches_have_the_trainers_greedy_ids(golden: Golden, model: runtime.Model) -> None:
    if not golden.facts["branches"]:
        pytest.skip("the case has no branches")
    expected = golden.facts["multi_generated"]
    found = model.generate_ids(golden.facts["branch_inputs"], max_new_tokens=len(expected[0]), ignore_eos=True)
    assert found == expected


def test_a_batch_gives_every_sequence_its_own_positions(qwen2: Golden, model_of: ModelOf) -> None:
    """The trainer's rotary module scrambles branches when a batch has several samples; ours must not."""
    ids, positions, pos2d = (qwen2.tensors[f"multi.{name}"] for name in ("input_ids", "position_ids", "pos2d"))
    shifted = (np.roll(ids, 1, axis=1), positions, pos2d[:, :, ::1] + np.array([128, 3]))
    for kind in BACKENDS:
        model = model_of(qwen2, kind)
        both = model.logits(
            np.concatenate([ids, shifted[0]]),
            np.concatenate([positions, shifted[1]]),
            np.concatenate([pos2d, shifted[2]]),
        )
        np.testing.assert_allclose(both[:1], qwen2.tensors["multi.logits"], rtol=0, atol=TOLERANCE)
        alone = model.logits(*shifted)
        np.testing.assert_allclose(both[1:], alone, rtol=0, atol=logits_bound(alone))
