"""Recognises weights that another program quantised, by their configuration and by the names of their tensors."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pos2d.config_values import ConfigValues
from pos2d.errors import InputError
from pos2d.sources.files.tensor_places import TensorPlace

# Keys of config.json that only a quantised model has, and what they are called.
CONFIG_KEYS = {"quantization_config": None, "compression_config": "compressed-tensors", "quantization": "MLX"}
METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "mxfp4": "MXFP4",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "exl2": "EXL2",
}
# Endings of names that only one way to quantise writes, the most telling first.
ENDINGS: Mapping[str, tuple[str, ...]] = {
    "bitsandbytes": (".SCB", ".weight_format", ".absmax", ".quant_map", "bitsandbytes__nf4", "bitsandbytes__fp4"),
    "GPTQ": (".g_idx",),
    "GPTQ or AWQ": (".qweight", ".qzeros"),
    "compressed-tensors": (".weight_packed", ".weight_shape", ".weight_zero_point"),
    "EXL2": (".q_weight", ".q_scale", ".q_invperm"),
    "HQQ": (".W_q",),
    "AQLM": (".codebooks", ".codes"),
    "MXFP4": ("_blocks", ".weight_scale_2"),
    "Quanto": (".weight._data", ".weight._scale"),
    "FP8": (".weight_scale_inv",),
}
# Files of settings that some programs write beside the weights.
FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "ModelOpt"}
CURE = "give the unquantised model that it was made from; the export can quantise it"


def refuse_quantised_config(config: Mapping[str, Any], source: str) -> None:
    """Check that a configuration does not say that its weights are quantised; null and an empty object say nothing.

    Raises:
        InputError: it does.
    """
    values = ConfigValues(config, source)
    for key, name in CONFIG_KEYS.items():
        block = values.block(key)
        if block.values:
            method = str(block.values.get("quant_method", "") or "")
            name = name or METHODS.get(method.lower(), method[:40])
            raise InputError(f"{source}: the model is quantised ({key}{f', {name}' if name else ''}); {CURE}")


def refuse_quantised_tensors(directory: Path, tensors: Mapping[str, TensorPlace]) -> None:
    """Check that the tensors of a directory are not those of a quantised model.

    Raises:
        InputError: they are.
    """
    method = _method(directory, tensors)
    if method is not None:
        raise InputError(f"{directory}: the model is quantised (its tensors are those of {method}); {CURE}")


def _method(directory: Path, tensors: Mapping[str, TensorPlace]) -> str | None:
    beside = [name for file, name in FILES.items() if (directory / file).is_file()]
    for name, endings in ENDINGS.items():
        if any(tensor.endswith(endings) for tensor in tensors):
            return beside[0] if beside and name.startswith("GPTQ") else name
    weights = {name: place.dtype for name, place in tensors.items() if name.endswith("_proj.weight")}
    if any(dtype.startswith("F8") for dtype in weights.values()):
        return "FP8"
    scaled = _has(tensors, ".weight_scale") or _has(tensors, ".input_scale")
    if scaled and not all(dtype.startswith(("F", "B")) for dtype in weights.values()):
        return "compressed-tensors"
    if "U32" in weights.values():
        return "MLX"
    return beside[0] if beside and any(dtype in ("I8", "U8", "I32") for dtype in weights.values()) else None


def _has(tensors: Collection[str], ending: str) -> bool:
    return any(name.endswith(ending) for name in tensors)
