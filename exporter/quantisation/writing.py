"""Write the exact sum of one tensor through an encoding, some rows at a time."""

from pos2d.errors import InputError
from pos2d.exporter.quantisation.encodings import Encoding, Rounded, Write
from pos2d.sources.files.tensor_io import TensorFile
from pos2d.sources.files.tensor_places import torch_dtype
from pos2d.sources.tensors.exact_rows import exact_rows
from pos2d.sources.tensors.rounding import is_finite, round_nearest
from pos2d.sources.tensors.stats import DeltaStats, delta_stats
from pos2d.sources.tensors.tensor_plan import PlannedTensor


def write_tensor(
    tensor: PlannedTensor,
    file: TensorFile,
    encoding: Encoding,
    write: Write,
    *,
    name: str = "",
    first: int = 0,
    measure: bool | None = None,
) -> DeltaStats | None:
    """Write all rows of a tensor, from row ``first`` of the output ``name`` on (by default the tensor's name).

    Returns the statistics of what was stored, or None without ``measure``, which is by default for quantised tensors.

    Raises:
        InputError: values that are not finite, exactly or as stored.
    """
    import torch

    name = name or tensor.name
    stored_type = torch_dtype(encoding.dtype) if isinstance(encoding, Rounded) else None
    measure = stored_type is None if measure is None else measure
    stats = DeltaStats() if measure else None
    for block in exact_rows(tensor, file, encoding.elements):
        stored: torch.Tensor = encoding.encode(name, first + block.rows.start, block.exact, write)
        if not is_finite(stored):
            raise InputError(f"tensor {tensor.name} does not fit {tensor.dtype}; use `dtype` float32 or bfloat16")
        if stats is not None:
            delta = torch.zeros_like(block.weight) if block.delta is None else block.delta
            # That a type is converted counts as no change.
            before = block.weight if stored_type is None else round_nearest(block.weight, stored_type).double()
            stats += delta_stats(block.weight, before, delta, stored)
    return stats
