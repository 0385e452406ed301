"""One tensor of a merge, block by block: the exact sum of its base and its deltas, rounded once."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pos2d.errors import InputError
from pos2d.sources.files.tensor_io import TensorFile
from pos2d.sources.files.tensor_places import torch_dtype
from pos2d.sources.tensors.exact_rows import ExactRows, exact_rows
from pos2d.sources.tensors.rounding import Rounding, is_finite, round_nearest
from pos2d.sources.tensors.tensor_plan import PlannedTensor

if TYPE_CHECKING:
    import torch


def rounded_rows(
    tensor: PlannedTensor, file: TensorFile, rounding: Rounding
) -> "Iterator[tuple[ExactRows, torch.Tensor]]":
    """All rows of a tensor from the open ``file`` of its base, in order, each block with its values in the stored type.

    Raises:
        InputError: values that are not finite after rounding.
    """
    dtype = torch_dtype(tensor.dtype)
    # Stochastic rounding is for deltas; a tensor without one is converted to the nearest value.
    round_to = rounding.of(tensor.name) if tensor.deltas else round_nearest
    for block in exact_rows(tensor, file, check_finite=False):  # rounding keeps NaN and infinity, so one check will do
        rounded = round_to(block.exact, dtype)
        if not is_finite(rounded):
            raise InputError(
                f"tensor {tensor.name} has NaN or infinite values in {dtype}; "
                "use `dtype` float32 or bfloat16, or check the base and the adapter"
            )
        yield block, rounded


def check_copied(tensor: PlannedTensor, values: "torch.Tensor") -> None:
    """Check values of a tensor that is copied.

    Raises:
        InputError: values that are not finite.
    """
    if not is_finite(values):
        raise InputError(
            f"{tensor.source.file}: tensor {tensor.origin} has NaN or infinite values; copy the base again"
        )
