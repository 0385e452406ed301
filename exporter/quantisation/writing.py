"""The exact values of one tensor, block by block, on their way through an encoding into a file."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pos2d.errors import InputError
from pos2d.exporter.adapters.deltas import exact_sum
from pos2d.exporter.files.tensor_io import BLOCK_ELEMENTS, TensorFile, row_blocks
from pos2d.exporter.merging.ledger import Tally, tally_of
from pos2d.exporter.quantisation.encodings import Encoding, Rounded, Write
from pos2d.exporter.tensors.plan import PlannedTensor
from pos2d.exporter.tensors.rounding import is_finite

if TYPE_CHECKING:
    import torch


def exact_rows(
    tensor: PlannedTensor, file: TensorFile, elements: int = BLOCK_ELEMENTS
) -> "Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor | None]]":
    """Rows of a tensor: which, the base's values, their sum with what is added, and what is added, all float64.

    About ``elements`` values at once.

    Raises:
        InputError: values that are not finite.
    """
    changes = [change.widened() for change in tensor.changes]
    for rows, _, weight in row_blocks(file, tensor.origin, tensor.source, elements):
        exact, delta = exact_sum(weight, changes, rows) if changes else (weight, None)
        if not is_finite(exact):
            raise InputError(f"tensor {tensor.name} has NaN or infinite values; check the base and the adapter")
        yield rows, weight, exact, delta


def write_tensor(
    tensor: PlannedTensor, file: TensorFile, encoding: Encoding, write: Write, *, name: str = "", first: int = 0
) -> Tally | None:
    """Write all rows of a tensor under ``name`` (its own, where that is empty) from row ``first`` on.

    Returns sums over a quantised tensor; nothing of others.

    Raises:
        InputError: values that are not finite, or that are not once they are stored.
    """
    import torch

    name = name or tensor.name
    tally = None if isinstance(encoding, Rounded) else Tally()
    for rows, weight, exact, delta in exact_rows(tensor, file, encoding.elements):
        stored: torch.Tensor = encoding.encode(name, first + rows.start, exact, write)
        if not is_finite(stored):
            raise InputError(
                f"tensor {tensor.name} does not fit {tensor.target.dtype}; use --dtype float32 or bfloat16"
            )
        if tally is not None:
            tally += tally_of(weight, weight, torch.zeros_like(weight) if delta is None else delta, stored)
    return tally
