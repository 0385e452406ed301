"""How the linear layers of an artifact are quantised: the recipes that stand in its manifest."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self, get_args

from pos2d.bnb_format import NF4_BLOCK, NF4_ROWS, BnbQuant
from pos2d.config_values import ConfigValues
from pos2d.errors import InputError

GraphQuant = Literal["int8", "int4", "auto"]
# Types of llama.cpp: blocks of 32 inputs with one float16 scale, 8 or 4 bits a value.
GgufQuant = Literal["q8_0", "q4_0"]
GGUF_BLOCK = 32
# Bits of most layers; for "auto", of the layers that get no more.
BITS: Mapping[GraphQuant, int] = {"int8": 8, "int4": 4, "auto": 4}
ALL_BITS = tuple(sorted(set(BITS.values())))
BLOCK_SIZES = (16, 32, 64, 128, 256)
# Products of larger blocks are faster, and calibration gains more than they lose at 4 bits; "auto" is for the
# best model of a given size, which has small blocks (benchmarks/nbits.py).
DEFAULT_BLOCKS: Mapping[GraphQuant, int] = {"int8": 32, "int4": 128, "auto": 32}
UNCALIBRATED_BLOCK = 32


@dataclass(frozen=True, slots=True)
class WeightRecipe:
    """What the recipes of weight files share: a name, and the full names of linear layers that are not quantised."""

    name: str
    skip_modules: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"skip_modules": list(self.skip_modules)}

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`.

        Raises:
            InputError: unknown or missing keys, or values of other types.
        """
        _check_keys(cls, block)
        values = ConfigValues(block, "quantisation")
        return cls(values.text("name"), tuple(values.texts("skip_modules")))


@dataclass(frozen=True, slots=True)
class BnbRecipe(WeightRecipe):
    """How a bitsandbytes artifact is quantised.

    ``8bit``: int8 with the largest magnitude of every row as its scale. ``nf4``: four bits, normal-float, with a scale
    for every 64 values. ``skip_modules``: full names of the linear layers that are not quantised.

    Raises:
        InputError: another name.
    """

    name: BnbQuant

    def __post_init__(self) -> None:
        if self.name not in get_args(BnbQuant):
            raise InputError(f"quantisation {self.name!r} is not one of {', '.join(get_args(BnbQuant))}")

    def unsupported(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """The layers, by name and ``[out, in]``, for which bitsandbytes has no kernel or a wrong one.

        Its nf4 on a CPU (0.50) takes the scales of another block where blocks run over the end of a row, and fails
        where rows do not come in whole groups.
        """
        if self.name != "nf4":
            return []
        return [module for module, (rows, columns) in shapes.items() if columns % NF4_BLOCK or rows % NF4_ROWS]

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that every layer can be quantised; ``shapes`` are ``[out, in]`` by name.

        Raises:
            InputError: layers that this recipe cannot quantise.
        """
        wrong = self.unsupported(shapes)
        if wrong:
            cure = "leave them out with `skip_modules`, or use 8bit" if len(wrong) < len(shapes) else "use 8bit"
            raise InputError(
                f"nf4 needs multiples of {NF4_BLOCK} inputs and {NF4_ROWS} outputs, and {wrong[0]} is "
                f"{shapes[wrong[0]]} ({len(wrong)} such layers); {cure}"
            )


@dataclass(frozen=True, slots=True)
class GgufRecipe(WeightRecipe):
    """How a GGUF file is quantised: ``name`` is the type of most weights, in lower case.

    The head, and an embedding that is the head as well, have 8 bits in either. ``skip_modules``: full names of the
    linear layers that are not quantised.

    Raises:
        InputError: another name.
    """

    name: GgufQuant

    def __post_init__(self) -> None:
        if self.name not in get_args(GgufQuant):
            raise InputError(f"quantisation {self.name!r} is not one of {', '.join(get_args(GgufQuant))}")


def weight_recipe(block: Mapping[str, Any]) -> BnbRecipe | GgufRecipe:
    """The recipe of a torch artifact or of a GGUF file, from its JSON.

    Raises:
        InputError: see :meth:`BnbRecipe.from_dict`.
    """
    kind = GgufRecipe if block.get("name") in get_args(GgufQuant) else BnbRecipe
    return kind.from_dict(block)


@dataclass(frozen=True, slots=True)
class GraphRecipe:
    """How an ONNX artifact is quantised: integers with one scale for each block of a row, as MatMulNBits reads them.

    A block is ``block_size`` inputs. ``bits`` names every quantised layer and says 4 or 8; all other layers keep the
    type of the graph. Layers in ``float_activations`` multiply with float activations; the others round their inputs to
    8 bits, block by block, as well (accuracy level 4). ``calibrated``: all layers but the head were quantised with
    GPTQ.

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
        if not set(self.bits.values()) <= set(ALL_BITS):
            raise InputError(f"bits {sorted(set(self.bits.values()))} are not {' or '.join(map(str, ALL_BITS))}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"bits": dict(self.bits), "float_activations": list(self.float_activations)}

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> "GraphRecipe":
        """Inverse of :meth:`to_dict`.

        Raises:
            InputError: unknown or missing keys, or values of other types.
        """
        _check_keys(cls, block)
        values = ConfigValues(block, "quantisation")
        bits = values.block("bits")
        return cls(
            name=values.text("name"),
            block_size=values.whole("block_size"),
            bits={module: bits.whole(module) for module in bits.values},
            float_activations=tuple(values.texts("float_activations")),
            calibrated=values.switch("calibrated"),
        )


def _check_keys(recipe: type[Any], block: Mapping[str, Any]) -> None:
    known = {field.name for field in fields(recipe)}
    if set(block) != known:
        raise InputError(f"quantisation: keys {sorted(set(block) ^ known)} are missing or unknown")
