"""One tensor of a merge, block by block: the exact sum of its base and its changes, rounded once."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pos2d.errors import InputError
from pos2d.exporter.adapters.deltas import exact_sum
from pos2d.exporter.files.tensor_io import TensorFile, row_blocks
from pos2d.exporter.inputs.checkpoint import DTYPES
from pos2d.exporter.tensors.plan import PlannedTensor
from pos2d.exporter.tensors.rounding import Rounding, is_finite, round_nearest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class RoundedRows:
    """``rows`` of a tensor: the base's bytes, which are good until the next block, and its float64 values; what is
    added to them, where something is; and the result in the type that is stored."""

    rows: slice
    data: memoryview
    weight: "torch.Tensor"
    delta: "torch.Tensor | None"
    rounded: "torch.Tensor"


def rounded_rows(tensor: PlannedTensor, file: TensorFile, rounding: Rounding) -> Iterator[RoundedRows]:
    """All rows of a tensor from the open ``file`` of its base, in their order.

    Raises:
        InputError: values that are not finite after rounding.
    """
    import torch

    dtype = getattr(torch, DTYPES[tensor.target.dtype][0])
    changes = [change.widened() for change in tensor.changes]
    # Only a change is worth noise: what has none is converted to the nearest value.
    rounded_to = rounding.of(tensor.name) if changes else round_nearest
    for rows, data, weight in row_blocks(file, tensor.origin, tensor.source):
        exact, delta = exact_sum(weight, changes, rows) if changes else (weight, None)
        rounded = rounded_to(exact, dtype)
        if not is_finite(rounded):
            raise InputError(
                f"tensor {tensor.name} has NaN or infinite values in {dtype}; "
                "use --dtype float32 or bfloat16, or check the base and the adapter"
            )
        yield RoundedRows(rows, data, weight, delta, rounded)


def check_copied(tensor: PlannedTensor, values: "torch.Tensor") -> None:
    """Raises:
    InputError: ``values`` of a tensor that is copied are not finite.
    """
    if not is_finite(values):
        raise InputError(
            f"{tensor.source.file}: tensor {tensor.origin} has NaN or infinite values; copy the base again"
        )
