"""The options of an export that say what is written."""

from dataclasses import dataclass
from typing import Literal

from pos2d.options import check_options, option

FormatName = Literal["onnx", "genai", "bnb", "stock", "gguf"]
# Headings of help pages, for options that one format takes.
ONNX, CHECKPOINTS = "For --format onnx and genai", "For --format bnb and stock"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What :func:`pos2d.export` writes; a format says in its ``OPTIONS`` which of these it takes.

    Raises:
        UsageError: a value of another type, or one that does not exist.
    """

    format: FormatName = option(
        "onnx",
        "onnx: decoder graphs with a KV cache. genai: the same decoder as onnxruntime-genai runs it. bnb: a "
        "bitsandbytes checkpoint. stock: a checkpoint of the base's own architecture, which other programs load "
        "without extra code. gguf: a file for llama.cpp and a Modelfile for Ollama. Of a model with 2D RoPE, genai, "
        "stock and gguf have one branch.",
    )
    quant: Literal["none", "int8", "int4", "auto", "8bit", "nf4", "q8_0", "q4_0"] = option(
        "none",
        "Precision of the linear layers. onnx and genai: none, int8, int4, or auto, which mixes 4 and 8 bits and needs "
        "`target_size`. bnb: 8bit or nf4; one of the two is required. stock: none, 8bit or nf4. gguf: none, q8_0 or "
        "q4_0.",
    )
    skip_modules: str | None = option(
        None,
        "Linear layers that are not quantised: full names (lm_head), last parts of names (down_proj) or whole layers "
        "of the decoder (model.layers.0), separated by commas.",
        metavar="NAMES",
        default_text="none of onnx, genai and gguf, lm_head of bnb and stock",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = option(
        "auto",
        "Type of the weights that are not quantised. onnx and genai: float32 (auto) or float16, also for activations "
        "and KV cache. bnb and stock: auto keeps the type of each weight, and makes bfloat16 of a float32 base that is "
        "quantised. gguf: float16 (auto), float32 or bfloat16.",
    )
    block_size: int | None = option(
        None,
        "Quantisation block size: the number of inputs that share one scale (16, 32, 64, 128 or 256).",
        default_text="128 for int4 with calibration, else 32",
        section=ONNX,
    )
    float_activations: str = option(
        "",
        "4-bit layers whose inputs stay in floating point; the inputs of all other quantised layers are rounded to 8 "
        "bits. Such layers are slower, and some models need them to pass the final check. Layers are named as for "
        "`skip_modules`.",
        metavar="NAMES",
        default_text="none",
        section=ONNX,
    )
    target_size: str | None = option(
        None,
        "Largest size of the weight file for `quant='auto'`, such as 90MB. All layers start at 4 bits, and the most "
        "sensitive ones get 8 bits as long as the file stays within this size.",
        metavar="SIZE",
        section=ONNX,
    )
    no_calibration: bool = option(
        False,
        "Round every weight to the nearest value. Without this option, quantised graphs are calibrated with GPTQ on "
        "random tokens and tokens that the model samples, which is slower and more accurate.",
        section=ONNX,
    )
    no_verify: bool = option(
        False,
        "onnx, genai and stock: skip the final check of what was written, the same check as that of the verify "
        "command. gguf: skip reading the file back and comparing it.",
    )
    max_shard_size: str | None = option(
        None,
        "Largest size of one weight file, such as 5GB.",
        metavar="SIZE",
        default_text="5GB",
        section=CHECKPOINTS,
    )

    def __post_init__(self) -> None:
        check_options(self)
