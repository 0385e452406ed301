"""Positions, branches, times and masks, compared with the trainer's layouts and with the rule itself."""

import numpy as np
import pytest

from pos2d.errors import InputError
from pos2d.layout import CONTEXT, build_continuations, build_layout, columnar_mask
from pos2d.spec import Rope2DSpec, pair_indices_for_ratio
from tests.conftest import Golden


def spec_of(golden: Golden) -> Rope2DSpec:
    facts = golden.facts
    indices = tuple(facts["pair_indices_1based"] or ())
    return Rope2DSpec(8, indices, facts["stride"], facts["align"], "columnar" if indices else "isolated")


@pytest.mark.parametrize("layout", ["multi", "context"])
def test_layout_is_the_trainers(golden: Golden, layout: str) -> None:
    if not golden.facts["branches"]:
        pytest.skip("the case has no branches")
    context = golden.facts["context_input"] if layout == "context" else None
    made = build_layout(golden.facts["branch_inputs"], spec_of(golden), context)
    expected = {
        name: golden.tensors[f"{layout}.{name}"][0] for name in ("input_ids", "position_ids", "pos2d", "time_ids")
    }
    np.testing.assert_array_equal(made.ids, expected["input_ids"])
    np.testing.assert_array_equal(made.positions, expected["position_ids"])
    np.testing.assert_array_equal(made.pos2d, expected["pos2d"])
    np.testing.assert_array_equal(made.times, expected["time_ids"])


def test_ratio_gives_the_trainers_pair_indices(golden: Golden) -> None:
    if golden.facts["ratio"] is None:
        pytest.skip("the case has no 2D RoPE")
    assert list(pair_indices_for_ratio(8, golden.facts["ratio"])) == golden.facts["pair_indices_1based"]


SPEC = Rope2DSpec(8, (5, 6, 7, 8), 128)
PROMPTS = [[1, 2, 3], [4], [5, 6]]


def test_one_branch_is_a_single_sequence() -> None:
    for visibility in ("columnar", "isolated"):
        made = build_layout([[7, 8, 9]], SPEC, visibility=visibility)
        np.testing.assert_array_equal(made.positions, [0, 1, 2])
        np.testing.assert_array_equal(made.pos2d, [[0, 0], [0, 1], [0, 2]])
        np.testing.assert_array_equal(made.mask(), np.tril(np.ones((3, 3), dtype=bool)))


@pytest.mark.parametrize("align_to", ["left", "right"])
@pytest.mark.parametrize("context", [None, [10, 11]])
def test_in_the_columnar_mask_a_token_attends_to_earlier_times_and_itself(
    align_to: str, context: list[int] | None
) -> None:
    made = build_layout(PROMPTS, Rope2DSpec(8, (7, 8), 128, align_to), context)  # type: ignore[arg-type]
    made = made.append([20, None, 22]).append([30, None, 32])
    for i in range(len(made)):
        for j in range(len(made)):
            assert made.mask()[i, j] == (made.times[j] < made.times[i] or i == j)
    np.testing.assert_array_equal(columnar_mask(made.times[None])[0], made.mask())
    np.testing.assert_array_equal(made.mask(len(made) - 2), made.mask()[-2:])


def test_right_alignment_ends_all_prompts_in_one_column() -> None:
    made = build_layout(PROMPTS, Rope2DSpec(8, (7, 8), 128, "right"), [10, 11])
    assert {int(made.times[slot]) for slot in made.last} == {4}


def test_append_takes_the_next_slots_in_branch_order_at_the_next_time_of_each_branch() -> None:
    made = build_layout(PROMPTS, SPEC).append([20, 21, 22])
    np.testing.assert_array_equal(made.positions[-3:], [6, 7, 8])
    np.testing.assert_array_equal(made.times[-3:], [3, 1, 2])
    np.testing.assert_array_equal(made.branches[-3:], [0, 128, 256])
    # The first branch's new token attends to the two in later slots, because their times are earlier.
    np.testing.assert_array_equal(
        made.mask(len(made) - 3)[:, -3:], [[True, True, True], [False, True, False], [False, True, True]]
    )


def test_a_stopped_branch_gets_no_token() -> None:
    made = build_layout(PROMPTS, SPEC).append([20, None, 22]).append([30, None, None])
    np.testing.assert_array_equal(made.ids[-3:], [20, 22, 30])
    np.testing.assert_array_equal(made.owners[-3:], [0, 2, 0])
    assert made.last == (8, 1, 7)


@pytest.mark.parametrize("context", [None, [10, 11]])
def test_isolated_branches_have_the_positions_that_they_would_have_alone(context: list[int] | None) -> None:
    together = build_layout(PROMPTS, SPEC, context, "isolated").append([20, 21, 22])
    for branch, prompt in enumerate(PROMPTS):
        alone = build_layout([prompt], SPEC, context, "isolated").append([20 + branch])
        visible = np.isin(together.owners, [branch, CONTEXT])
        np.testing.assert_array_equal(together.ids[visible], alone.ids)
        np.testing.assert_array_equal(together.positions[visible], alone.positions)
        np.testing.assert_array_equal(together.pos2d[visible], alone.pos2d)
        np.testing.assert_array_equal(together.mask()[np.ix_(visible, visible)], alone.mask())
        assert not together.mask()[np.ix_(together.owners == branch, ~visible)].any()


def test_empty_prompts_are_refused_by_number() -> None:
    with pytest.raises(InputError, match="prompt 2 is empty"):
        build_layout([[1], []], SPEC)
    with pytest.raises(InputError, match="no prompt"):
        build_layout([], SPEC)


@pytest.mark.parametrize("ids", [[7], [7, 8, 9, 10]])
@pytest.mark.parametrize("spec", [SPEC, Rope2DSpec(8, (), 128, visibility="isolated")])
def test_every_answer_of_one_prompt_has_the_tokens_and_positions_of_a_single_one(
    ids: list[int], spec: Rope2DSpec
) -> None:
    single = build_layout([ids], spec).append([20]).append([21])
    made = build_continuations(ids, 3, spec).append([20, None, 20]).append([21, None, 21])
    assert len(made) == len(ids) - 1 + 3 + 4
    for branch in (0, 2):
        seen = made.mask()[made.last[branch]].nonzero()[0]
        for name in ("ids", "positions", "pos2d", "times"):
            np.testing.assert_array_equal(getattr(made, name)[seen], getattr(single, name))
    assert made.ids[made.last[1]] == ids[-1]


def test_one_answer_of_one_prompt_is_a_single_sequence() -> None:
    made = build_continuations([7, 8], 1, SPEC)
    assert made.visibility == SPEC.visibility
    assert CONTEXT not in made.owners
    with pytest.raises(InputError):
        build_continuations([], 2, SPEC)
