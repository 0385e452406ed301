"""The weights of a merge: one shard at a time, under the base's file names."""

from pathlib import Path
from typing import TYPE_CHECKING

from exporter.adapter import Adapter
from exporter.base import INDEX, Checkpoint
from exporter.staging import write_json
from pos2d.errors import InputError
from pos2d.progress import Progress

if TYPE_CHECKING:
    import torch


def write_merged_weights(base: Checkpoint, adapter: Adapter, dtype: str, staging: Path) -> str:
    """Write every tensor of ``base``, with the adapter's change where it has one.

    Returns the name of the linear weights' type.

    Raises:
        InputError: see :func:`merged_tensor`.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    target = None if dtype == "auto" else getattr(torch, dtype)
    stored, total = "", 0
    with Progress("merging", len(base.tensors)) as progress:
        for file in base.files:
            shard: dict[str, torch.Tensor] = {}
            with safe_open(base.directory / file, framework="pt") as reader:
                for name in (n for n, place in base.tensors.items() if place.file == file):
                    shard[name] = merged_tensor(reader.get_tensor(name), name, adapter, target)
                    progress.advance()
            stored = next((_dtype_name(t) for n, t in shard.items() if n.endswith("_proj.weight")), stored)
            total += sum(tensor.nbytes for tensor in shard.values())
            save_file(shard, staging / file, metadata={"format": "pt"})
    if (base.directory / INDEX).is_file():
        weight_map = {name: place.file for name, place in base.tensors.items()}
        write_json(staging / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return stored


def merged_tensor(weight: "torch.Tensor", name: str, adapter: Adapter, target: "torch.dtype | None") -> "torch.Tensor":
    """``weight``, with the adapter's change added in float32 where it has one, rounded once to ``target``.

    Raises:
        InputError: values that are not finite after rounding.
    """
    dtype = target or weight.dtype
    module = name.removesuffix(".weight")
    exact = weight.float() + adapter.delta(module) if module in adapter.factors else weight
    result = exact.to(dtype)
    if not result.isfinite().all():
        raise InputError(
            f"tensor {name} has NaN or infinite values in {dtype}; use --dtype float32 or bfloat16, or check the base"
        )
    return result.contiguous()


def _dtype_name(tensor: "torch.Tensor") -> str:
    return str(tensor.dtype).removeprefix("torch.")
