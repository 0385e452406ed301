"""How the training placed tokens: what the call says, and the default by the form of the adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pos2d.errors import UsageError
from pos2d.options import check_options, option
from pos2d.spec import MAX_STRIDE, Align, Rope2DSpec, pair_indices_for_ratio, parse_pair_indices

DEFAULT_RATIO = 0.5
# Forms of adapters that the trainer writes.
TRAINER_FORMS = ("trainer", "state dict")


@dataclass(frozen=True, slots=True)
class TrainedFrequencies:
    """Which rotary frequencies the training gave to branch and time; the options exclude one another.

    ``pair_indices`` may also be given as a sequence of numbers.

    Raises:
        UsageError: more than one of them, or a value out of range.
    """

    rope_2d_ratio: float | None = option(
        None,
        "Share of the rotary frequencies, 0 to 1, that encode branch and time instead of the position; they are the "
        "slowest ones. Give the value of the training.",
        minimum=0,
        maximum=1,
        default_text="0.5 for the trainer's files, no 2D RoPE for others",
    )
    pair_indices: str | Sequence[int] | None = option(
        None,
        "Rotary frequencies that encode branch and time, counted from 1, such as 5,6,7,8; in place of a ratio.",
        metavar="NUMBERS",
    )
    no_patch_rope: bool = option(
        False,
        "The training used no 2D RoPE: tokens only have a position. This is the default for adapters of PEFT and MLX.",
    )

    def __post_init__(self) -> None:
        if isinstance(self.pair_indices, Sequence) and not isinstance(self.pair_indices, str):
            object.__setattr__(self, "pair_indices", ",".join(map(str, self.pair_indices)))
        check_options(self)
        if sum((self.rope_2d_ratio is not None, self.pair_indices is not None, self.no_patch_rope)) > 1:
            raise UsageError(
                "`rope_2d_ratio`, `pair_indices` and `no_patch_rope` exclude one another; give one of them"
            )

    @property
    def is_given(self) -> bool:
        """Whether the call says which positions the training had."""
        return (self.rope_2d_ratio, self.pair_indices, self.no_patch_rope) != (None, None, False)


@dataclass(frozen=True, slots=True)
class TrainedPositions(TrainedFrequencies):
    """How the training placed tokens, which the trainer does not save.

    Raises:
        UsageError: as :class:`TrainedFrequencies`.
    """

    branch_stride: int = option(
        128,
        "Step between the branch positions of neighbouring branches, as in the training.",
        minimum=1,
        maximum=MAX_STRIDE,
    )
    align_to: Align = option(
        "left",
        "Prompts of different length start in the same column (left) or end in the same column (right), as in the "
        "training.",
    )

    def resolve(self, frequencies: int) -> Rope2DSpec:
        """The positional contract for a base with this many rotary ``frequencies``, once the positions are given."""
        if self.pair_indices is not None:
            indices = parse_pair_indices(self.pair_indices)
        elif self.rope_2d_ratio is not None:
            indices = pair_indices_for_ratio(frequencies, self.rope_2d_ratio)
        else:
            return Rope2DSpec(frequencies, (), self.branch_stride, self.align_to, visibility="isolated")
        return Rope2DSpec(frequencies, indices, self.branch_stride, self.align_to)


@dataclass(frozen=True, slots=True)
class ChosenPositions:
    """The positions of a source; ``warnings`` and ``notes`` have a sentence where the call does not give them."""

    positions: TrainedPositions
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def choose_positions(given: TrainedPositions, forms: Mapping[str, str]) -> ChosenPositions:
    """The positions that the call gives, or the default for adapters of these ``forms``, by name.

    The trainer's files were trained with 2D RoPE unless its user turned that off. Adapters of PEFT and MLX are ordinary
    ones, and so is a model without an adapter.

    Raises:
        UsageError: a stride or an alignment without 2D RoPE, to which they belong.
    """
    if given.is_given:
        return ChosenPositions(given)
    if any(form in TRAINER_FORMS for form in forms.values()):
        warning = (
            f"no positions were given, so the trainer's default, `rope_2d_ratio={DEFAULT_RATIO}`, is used; if the "
            "training used another ratio, several branches give nonsense (`guess_ratio` of inspect finds it); a "
            "training without 2D RoPE needs `no_patch_rope`"
        )
        return ChosenPositions(replace(given, rope_2d_ratio=DEFAULT_RATIO), warnings=(warning,))
    if given != TrainedPositions():
        raise UsageError(
            "`branch_stride` and `align_to` belong to 2D RoPE, which only the trainer's own files have by default; "
            "give `rope_2d_ratio` or `pair_indices` as well, or leave them out"
        )
    note = (
        f"{', '.join(forms)}: read as an ordinary LoRA, without 2D RoPE; if it was trained with 2D RoPE, give "
        "`rope_2d_ratio`"
    )
    return ChosenPositions(replace(given, no_patch_rope=True), notes=(note,) if forms else ())
