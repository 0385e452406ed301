"""Which position each rotary frequency is rotated by: the value that is baked into every artifact."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pos2d.config_values import ConfigValues, shown
from pos2d.errors import InputError

Align = Literal["left", "right"]
Visibility = Literal["columnar", "isolated"]

POSITION, BRANCH, TIME = 0, 1, 2
VERSION = 1
# Beyond it float32 cannot tell the angles of neighbouring positions apart, and a few branches overflow integers.
MAX_STRIDE = 2**24


@dataclass(frozen=True, slots=True)
class Rope2DSpec:
    """The positional contract of one artifact.

    ``pair_indices`` are 1-based frequency numbers in the order in which the trainer lists them: the first is rotated by
    ``branch``, the second by ``time``, the third by ``branch`` again, and every frequency that is not listed by
    ``position``. Models without 2D RoPE have an empty tuple.

    Raises:
        InputError: an index out of range or listed twice, a stride below 1, an unknown alignment or visibility.
    """

    num_frequencies: int
    pair_indices: tuple[int, ...]
    branch_stride: int = 128
    align_to: Align = "left"
    visibility: Visibility = "columnar"

    def __post_init__(self) -> None:
        wrong = [i for i in self.pair_indices if not 1 <= i <= self.num_frequencies]
        if wrong:
            raise InputError(
                f"pair indices {wrong} are out of range: this base has frequencies 1 to {self.num_frequencies}"
            )
        if len(set(self.pair_indices)) != len(self.pair_indices):
            raise InputError(f"pair indices {list(self.pair_indices)} name a frequency twice")
        if self.branch_stride < 1:
            raise InputError(f"branch stride {self.branch_stride} must be at least 1")
        if self.branch_stride > MAX_STRIDE:
            raise InputError(f"branch stride {self.branch_stride} is more than {MAX_STRIDE}; 128 is usual")
        if self.align_to not in get_args(Align):
            raise InputError(f"`align_to` {self.align_to!r} must be one of {', '.join(get_args(Align))}")
        if self.visibility not in get_args(Visibility):
            raise InputError(f"`visibility` {self.visibility!r} must be one of {', '.join(get_args(Visibility))}")

    @property
    def axes(self) -> tuple[int, ...]:
        """What each frequency is rotated by: 0 position, 1 branch, 2 time."""
        axes = [POSITION] * self.num_frequencies
        for order, index in enumerate(self.pair_indices):
            axes[index - 1] = BRANCH if order % 2 == 0 else TIME
        return tuple(axes)

    @property
    def is_2d(self) -> bool:
        return bool(self.pair_indices)

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "axes": list(self.axes),
            "pair_indices": list(self.pair_indices),
            "branch_stride": self.branch_stride,
            "align_to": self.align_to,
            "visibility": self.visibility,
        }

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> "Rope2DSpec":
        """Inverse of :meth:`to_dict`.

        Raises:
            InputError: unknown or missing keys, another version, or axes and pair indices that disagree.
        """
        expected = {"version", "axes", "pair_indices", "branch_stride", "align_to", "visibility"}
        if set(block) != expected:
            raise InputError(f"rope_2d block: keys {sorted(set(block) ^ expected)} are missing or unknown")
        values = ConfigValues(block, "rope_2d block")
        if block["version"] != VERSION:
            raise InputError(
                f"rope_2d block: version {shown(block['version'])} is not {VERSION}; use a matching release"
            )
        spec = cls(
            num_frequencies=len(values.wholes("axes")),
            pair_indices=tuple(values.wholes("pair_indices")),
            branch_stride=values.whole("branch_stride"),
            align_to=values.text("align_to"),
            visibility=values.text("visibility"),
        )
        if list(spec.axes) != list(block["axes"]):
            raise InputError("rope_2d block: axes and pair_indices disagree")
        return spec


def pair_indices_for_ratio(num_frequencies: int, ratio: float) -> tuple[int, ...]:
    """The last ``max(1, min(F, round(F * ratio)))`` frequencies, 1-based, which trainers select with a ratio.

    ``round`` is Python's (half to even), as in the trainer.

    Raises:
        InputError: a ratio outside 0 to 1.
    """
    if not 0.0 <= ratio <= 1.0:
        raise InputError(f"rope 2D ratio {ratio} must be between 0 and 1")
    count = max(1, min(num_frequencies, round(num_frequencies * ratio)))
    return tuple(range(num_frequencies - count + 1, num_frequencies + 1))


def spans(numbers: Iterable[int]) -> str:
    """Format consecutive numbers as ``17-32``, others as a list."""
    listed = list(numbers)
    if len(listed) > 2 and listed == list(range(listed[0], listed[-1] + 1)):
        return f"{listed[0]}-{listed[-1]}"
    return ", ".join(map(str, listed))


def parse_pair_indices(text: str | Iterable[int]) -> tuple[int, ...]:
    """Parse ``"5,6,7,8"``, or an iterable of integers, to a tuple in the same order.

    Raises:
        InputError: an element that is not a whole number, or no element.
    """
    parts = text.replace(",", " ").split() if isinstance(text, str) else list(text)
    try:
        indices = tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        raise InputError(f"pair indices {text!r} must be whole numbers, such as 5,6,7,8") from None
    if not indices:
        raise InputError("pair indices are empty; use `no_patch_rope=True` for a model without 2D RoPE")
    return indices
