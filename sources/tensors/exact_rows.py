"""One tensor, block by block: the exact float64 sum of its base and its deltas."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pos2d.errors import InputError
from pos2d.sources.adapters.deltas import exact_sum
from pos2d.sources.files.tensor_io import BLOCK_ELEMENTS, TensorFile, row_blocks
from pos2d.sources.tensors.rounding import is_finite
from pos2d.sources.tensors.tensor_plan import PlannedTensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class ExactRows:
    """``rows`` of a tensor: the base's bytes, which are valid until the next block, and float64 values.

    ``weight``: the base's values; ``exact``: their sum with ``delta``, which is None where nothing is added.
    """

    rows: slice
    data: memoryview
    weight: "torch.Tensor"
    exact: "torch.Tensor"
    delta: "torch.Tensor | None"


def exact_rows(
    tensor: PlannedTensor, file: TensorFile, elements: int = BLOCK_ELEMENTS, *, check_finite: bool = True
) -> Iterator[ExactRows]:
    """All rows of a tensor from the open ``file`` of its base, in order, about ``elements`` values at a time.

    A caller that checks the stored values itself leaves ``check_finite`` out: rounding keeps NaN and infinity.

    Raises:
        InputError: values that are not finite, or a DoRA over rows that are zero.
    """
    deltas = [delta.widened() for delta in tensor.deltas]
    for rows, data, weight in row_blocks(file, tensor.origin, tensor.source, elements):
        try:
            exact, delta = exact_sum(weight, deltas, rows) if deltas else (weight, None)
        except InputError as error:
            raise InputError(f"{', '.join(tensor.adapters)}: tensor {tensor.name}: {error}") from None
        if check_finite and not is_finite(exact):
            raise InputError(f"tensor {tensor.name} has NaN or infinite values; check the base and the adapter")
        yield ExactRows(rows, data, weight, exact, delta)
