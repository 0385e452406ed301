"""How an artifact is loaded: the flags that every verb which runs a model shares."""

from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

from pos2d.dtypes import check_dtype
from pos2d.errors import UsageError
from pos2d.recipe import Quant

Int8Kernel = Literal["auto", "bnb", "weight-only"]
Attention = Literal["sdpa", "eager"]


class LoadFlags(TypedDict, total=False):
    """The fields of :class:`LoadOptions`, as the keywords of a function."""

    quant: Quant | None
    device: str
    dtype: str
    int8_kernel: Int8Kernel
    attn_implementation: Attention
    device_map: str | None
    max_memory: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to load an artifact.

    Args:
        quant: quantise a merged artifact while it is loaded, ``8bit`` or ``nf4``.
        device: torch's name of one; ``auto`` is a CUDA card, Apple's GPU, or the CPU. ONNX artifacts: ``cpu``,
            which is ``auto``, or ``cuda`` for float16 graphs.
        dtype: the type to compute in; ``auto`` is the stored one, and bfloat16 for 8 bits on a CPU.
        int8_kernel: ``weight-only`` multiplies int8 weights with activations as they are; ``bnb``, bitsandbytes' own,
            quantises these too; ``auto`` is the first, but for a CUDA card without Triton.
        attn_implementation: ``sdpa``, torch's fused attention, or ``eager``.
        device_map: ``auto`` spreads the layers over all cards and the CPU.
        max_memory: what each of these may take, such as ``0=8GB,cpu=16GB``.

    Raises:
        UsageError: a value that does not exist, or flags that contradict each other.
    """

    quant: Quant | None = None
    device: str = "auto"
    dtype: str = "auto"
    int8_kernel: Int8Kernel = "auto"
    attn_implementation: Attention = "sdpa"
    device_map: str | None = None
    max_memory: str | None = None

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        for name, allowed in (
            ("quant", (None, *get_args(Quant))),
            ("int8_kernel", get_args(Int8Kernel)),
            ("device_map", (None, "auto")),
        ):
            if getattr(self, name) not in allowed:
                known = ", ".join(str(value) for value in allowed if value is not None)
                raise UsageError(f"{name} {getattr(self, name)!r} is not one of {known}")
        if self.attn_implementation not in get_args(Attention):
            raise UsageError(
                f"attn_implementation {self.attn_implementation!r} is not one of {', '.join(get_args(Attention))}; "
                "columns need a mask of their own, which flash_attention_2 cannot be given"
            )
        if self.max_memory is not None and self.device_map is None:
            raise UsageError("--max-memory bounds what --device-map auto spreads; give both")
        if self.device_map is not None and self.device != "auto":
            raise UsageError("--device names one device and --device-map auto takes all; give one of them")
