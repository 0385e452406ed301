"""Which position each frequency is rotated by."""

import pytest

from pos2d.errors import InputError
from pos2d.spec import Rope2DSpec, pair_indices_for_ratio, parse_pair_indices


def test_listed_frequencies_alternate_between_branch_and_time() -> None:
    assert Rope2DSpec(8, (5, 6, 7, 8)).axes == (0, 0, 0, 0, 1, 2, 1, 2)
    assert Rope2DSpec(8, (8, 2, 5)).axes == (0, 2, 0, 0, 1, 0, 0, 1)
    assert Rope2DSpec(4, ()).axes == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("frequencies", "ratio", "count"),
    [(32, 0.5, 16), (32, 1.0, 32), (32, 0.0, 1), (5, 0.5, 2), (7, 0.5, 4), (32, 0.25, 8)],
)
def test_ratio_selects_the_last_frequencies_with_pythons_rounding(frequencies: int, ratio: float, count: int) -> None:
    assert pair_indices_for_ratio(frequencies, ratio) == tuple(range(frequencies - count + 1, frequencies + 1))


def test_from_dict_inverts_to_dict() -> None:
    spec = Rope2DSpec(8, (8, 2, 5), 256, "right", "isolated")
    assert Rope2DSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": [0, 0, 0, 0]}, "out of range"),
        ({"axes": [1, 0, 0, 0, 0, 0, 0, 0]}, "disagree"),
        ({"version": 2}, "version 2"),
        ({"surprise": 1}, "surprise"),
        ({"align_to": "middle"}, "middle"),
        ({"visibility": "all"}, "all"),
        ({"branch_stride": 0}, "stride 0"),
        ({"pair_indices": [8, 8]}, "twice"),
    ],
)
def test_invalid_blocks_are_refused(change: dict[str, object], message: str) -> None:
    block = Rope2DSpec(8, (7, 8)).to_dict() | change
    with pytest.raises(InputError, match=message):
        Rope2DSpec.from_dict(block)


def test_pair_indices_keep_their_order() -> None:
    assert parse_pair_indices("8, 2 5") == (8, 2, 5)
    assert parse_pair_indices([8, 2]) == (8, 2)
    for wrong in ("", "a,b", "1.5"):
        with pytest.raises(InputError):
            parse_pair_indices(wrong)


@pytest.mark.parametrize("ratio", [-0.1, 1.1])
def test_ratios_outside_0_to_1_are_refused(ratio: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        pair_indices_for_ratio(8, ratio)
