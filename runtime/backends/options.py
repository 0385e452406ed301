"""Options of loading an artifact, which every verb that runs a model shares."""

from dataclasses import dataclass
from typing import Literal, get_args

from pos2d.bnb_format import BnbQuant
from pos2d.errors import UsageError
from pos2d.options import check_options, option
from pos2d.threads import ThreadOptions

Int8Kernel = Literal["auto", "bnb", "weight-only"]
Attention = Literal["sdpa", "eager"]
LoadDtype = Literal["auto", "float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions(ThreadOptions):
    """How an artifact is loaded.

    ``threads`` sets torch's number of threads for the whole process.

    Raises:
        UsageError: a value that does not exist, or options that contradict each other.
    """

    quant: BnbQuant | None = option(
        None, "Quantise a model that is not quantised, with bitsandbytes, while it is loaded.", default_text="no"
    )
    device: str = option(
        "auto",
        "auto, cpu, cuda, cuda:1 or mps. ONNX artifacts run on cpu, or on cuda if they are float16. Nothing has been "
        "tested on a GPU yet.",
        metavar="NAME",
    )
    dtype: LoadDtype = option(
        "auto",
        "Type to compute in. auto is the stored type, except bfloat16 for 8-bit weights on a CPU. ONNX artifacts "
        "compute in their stored type.",
    )
    int8_kernel: Int8Kernel = option(
        "auto",
        "Kernel for 8-bit weights on torch. weight-only: activations stay in floating point. bnb: the kernel of "
        "bitsandbytes, which quantises activations too. auto: weight-only, except on a CUDA GPU without Triton.",
    )
    attn_implementation: Attention = option("sdpa", "Attention on torch. sdpa: fused. eager: not fused.")
    device_map: Literal["auto"] | None = option(
        None, "Spread the layers of a torch model over all GPUs and the CPU.", default_text="one device"
    )
    max_memory: str | None = option(
        None,
        "Memory limits for `device_map`, such as 0=8GB,cpu=16GB; 0 is the first GPU.",
        metavar="LIMITS",
        default_text="the free memory",
    )

    def __post_init__(self) -> None:
        if self.attn_implementation not in get_args(Attention):
            raise UsageError(
                f"`attn_implementation` {self.attn_implementation!r} is not one of {', '.join(get_args(Attention))}; "
                "columns need a mask of their own, which flash_attention_2 does not take"
            )
        check_options(self)
        if self.max_memory is not None and self.device_map is None:
            raise UsageError("`max_memory` limits the devices of `device_map='auto'`; give both")
        if self.device_map is not None and self.device != "auto":
            raise UsageError("`device` names one device and `device_map='auto'` uses all of them; give one of the two")
