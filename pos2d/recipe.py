"""How the linear layers of an artifact are quantised."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from pos2d.errors import InputError

Quant = Literal["8bit", "nf4"]
NF4_BLOCK, NF4_ROWS = 64, 32
# Activations above it are multiplied in 16 bits by bitsandbytes' int8 kernel: the default of its papers and loaders.
OUTLIER_THRESHOLD = 6.0


@dataclass(frozen=True, slots=True)
class QuantRecipe:
    """``8bit``: int8 with the largest magnitude of every row as its scale (LLM.int8(), arXiv 2208.07339); ``nf4``: four
    bits, normal-float, a scale for 64 values (QLoRA, arXiv 2305.14314). Both in the files of bitsandbytes.

    ``skip_modules``: full names of the linear layers that keep their type.

    Raises:
        InputError: another name.
    """

    name: Quant
    skip_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in get_args(Quant):
            raise InputError(f"quantisation {self.name!r} is not one of {', '.join(get_args(Quant))}")

    def misfits(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """The layers, by name and ``[out, in]``, for which bitsandbytes has no kernel or a wrong one.

        Its nf4 on a CPU (0.50) takes the scales of another block where blocks run over the end of a row, and fails
        where rows do not come in whole groups.
        """
        if self.name != "nf4":
            return []
        return [module for module, (rows, columns) in shapes.items() if columns % NF4_BLOCK or rows % NF4_ROWS]

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises:
        InputError: layers that this recipe cannot quantise.
        """
        wrong = self.misfits(shapes)
        if wrong:
            cure = "leave them out with --skip-modules, or use 8bit" if len(wrong) < len(shapes) else "use 8bit"
            raise InputError(
                f"nf4 needs multiples of {NF4_BLOCK} inputs and {NF4_ROWS} outputs, and {wrong[0]} is "
                f"{shapes[wrong[0]]} ({len(wrong)} such layers); {cure}"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"skip_modules": list(self.skip_modules)}

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> "QuantRecipe":
        """Inverse of :meth:`to_dict`.

        Raises:
            InputError: unknown or missing keys.
        """
        if set(block) != {"name", "skip_modules"}:
            raise InputError(
                f"quantisation: keys {sorted(set(block) ^ {'name', 'skip_modules'})} are missing or unknown"
            )
        return cls(block["name"], tuple(block["skip_modules"]))
