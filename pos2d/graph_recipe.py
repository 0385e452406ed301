"""How the linear layers of an ONNX artifact are quantised."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from pos2d.errors import InputError

GraphQuant = Literal["int8", "int4", "auto"]
# Of most layers; with "auto", of those that get no more.
BITS: Mapping[GraphQuant, int] = {"int8": 8, "int4": 4, "auto": 4}
BLOCK_SIZES = (16, 32, 64, 128, 256)
# Products of larger blocks are faster, and calibration more than pays for what they cost 4 bits; "auto" is for the best
# model of a size, which has small ones (benchmarks/nbits.py).
DEFAULT_BLOCKS: Mapping[GraphQuant, int] = {"int8": 32, "int4": 128, "auto": 32}
UNCALIBRATED_BLOCK = 32


@dataclass(frozen=True, slots=True)
class GraphRecipe:
    """Whole numbers with a scale for every ``block_size`` inputs of a row, as MatMulNBits of ONNX Runtime reads them.

    ``bits`` names every quantised layer and has 4 or 8 for it; all others keep the type of the graph. The layers of
    ``float_activations`` multiply with float activations, the others round these to 8 bits, block by block, as well
    (accuracy level 4). ``calibrated``: errors are made up for in the layers' other columns (GPTQ), in all but the head.

    Raises:
        InputError: another name, block size or number of bits.
    """

    name: GraphQuant
    block_size: int
    bits: Mapping[str, int] = field(default_factory=dict)
    float_activations: tuple[str, ...] = ()
    calibrated: bool = False

    def __post_init__(self) -> None:
        if self.name not in get_args(GraphQuant):
            raise InputError(f"quantisation {self.name!r} is not one of {', '.join(get_args(GraphQuant))}")
        if self.block_size not in BLOCK_SIZES:
            raise InputError(f"block size {self.block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
        if not set(self.bits.values()) <= set(BITS.values()):
            raise InputError(f"bits {sorted(set(self.bits.values()))} are not 4 or 8")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"bits": dict(self.bits), "float_activations": list(self.float_activations)}

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> "GraphRecipe":
        """Inverse of :meth:`to_dict`.

        Raises:
            InputError: unknown or missing keys.
        """
        known = {field.name for field in fields(cls)}
        if set(block) != known:
            raise InputError(f"quantisation: keys {sorted(set(block) ^ known)} are missing or unknown")
        return cls(**{**block, "float_activations": tuple(block["float_activations"])})
