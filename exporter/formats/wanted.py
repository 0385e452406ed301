"""What is wanted of an export, checked before anything is read."""

from dataclasses import dataclass
from typing import get_args

from pos2d.dtypes import check_dtype
from pos2d.errors import UsageError
from pos2d.graph_recipe import BLOCK_SIZES, GraphQuant
from pos2d.recipe import Quant

FORMATS = ("onnx", "bnb")
GRAPH_DTYPES = ("float32", "float16")


@dataclass(frozen=True, slots=True)
class Wanted:
    """The flags of :func:`pos2d.export` that say what is written.

    ``onnx``: decoders with their KV cache, in ``dtype`` float32 (``auto``) or float16. ``quant``: ``int8``, ``int4`` or
    ``auto``, which spends ``target_size`` where 4 bits cost most; ``block_size`` inputs share a scale (32).
    ``float_activations``: 4-bit layers whose inputs are not rounded. ``no_calibration``: each value is rounded for
    itself, which is faster and worse.

    ``bnb``: a bitsandbytes checkpoint, ``quant`` ``8bit`` or ``nf4``; ``dtype`` is the type of what is not quantised
    (``auto``: each tensor keeps its own).

    ``skip_modules``: linear layers that are not quantised (none of ``onnx``, ``lm_head`` of ``bnb``). Layers are named
    as :func:`pos2d.exporter.quantisation.module_names.named_modules` says.

    Raises:
        UsageError: something that does not exist, or that the format would not heed.
    """

    format: str
    quant: str | None
    block_size: int | None
    skip_modules: str | None
    float_activations: str
    target_size: str | None
    dtype: str
    max_shard_size: str | None
    no_verify: bool
    no_calibration: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"format {self.format!r} is not one of {', '.join(FORMATS)}")
        check_dtype(self.dtype)
        if self.format == "bnb":
            self._check_bnb()
        else:
            self._check_onnx()

    def _check_bnb(self) -> None:
        if self.quant not in get_args(Quant):
            raise UsageError(f"--format bnb needs --quant {' or '.join(get_args(Quant))}")
        if self.no_verify:
            raise UsageError("--no-verify belongs to --format onnx; eval measures a quantised artifact")
        if self.no_calibration:
            raise UsageError("--no-calibration belongs to --format onnx; bitsandbytes' formats know no calibration")
        if self.block_size is not None or self.float_activations or self.target_size is not None:
            raise UsageError("--block-size, --float-activations and --target-size belong to --format onnx")

    def _check_onnx(self) -> None:
        if self.quant is not None and self.quant not in get_args(GraphQuant):
            raise UsageError(f"--format onnx takes --quant {', '.join(get_args(GraphQuant))}, or none")
        if self.max_shard_size is not None:
            raise UsageError("--max-shard-size belongs to --format bnb; a graph has one file of weights")
        if self.dtype not in ("auto", *GRAPH_DTYPES):
            raise UsageError(f"--format onnx takes --dtype {' or '.join(GRAPH_DTYPES)}")
        if self.quant is None and (
            self.block_size or self.skip_modules or self.float_activations or self.no_calibration
        ):
            raise UsageError("--block-size, --skip-modules, --float-activations and --no-calibration belong to --quant")
        if self.block_size is not None and self.block_size not in BLOCK_SIZES:
            raise UsageError(f"--block-size {self.block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
        if (self.target_size is not None) != (self.quant == "auto"):
            raise UsageError("--quant auto and --target-size belong together: bits are chosen to fill that size")
