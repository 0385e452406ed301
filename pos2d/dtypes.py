"""The number types of weights: their names in torch and in safetensors files, and their sizes."""

from typing import Literal

# The types that a model computes in, by torch's names.
ComputeDtype = Literal["float32", "float16", "bfloat16"]
COMPUTE_DTYPES = ("float32", "float16", "bfloat16")

# Name in safetensors files, torch's name, and bytes, in the order in which the safetensors library ranks types.
_TABLE = (
    ("U8", "uint8", 1),
    ("I8", "int8", 1),
    ("BF16", "bfloat16", 2),
    ("F16", "float16", 2),
    ("F32", "float32", 4),
    ("F64", "float64", 8),
)
RANKS = {safetensors: rank for rank, (safetensors, _, _) in enumerate(_TABLE)}
TORCH_NAMES = {safetensors: torch for safetensors, torch, _ in _TABLE}
SAFETENSORS_NAMES = {torch: safetensors for safetensors, torch, _ in _TABLE}
# Bytes of one value, by torch's name and by safetensors' name.
ITEM_BYTES = {name: size for safetensors, torch, size in _TABLE for name in (safetensors, torch)}
FLOAT_TYPES = ("BF16", "F16", "F32", "F64")
