"""A merge that is not written: each tensor is computed when a loader requests it and is not stored."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pos2d.sources.checkpoints.checkpoint import Checkpoint
from pos2d.sources.files.parallel import single_threaded_torch
from pos2d.sources.files.tensor_io import TensorFile, opened
from pos2d.sources.files.tensor_places import safetensors_name, torch_dtype
from pos2d.sources.tensors.rounded_rows import check_copied, rounded_rows
from pos2d.sources.tensors.rounding import Rounding
from pos2d.sources.tensors.tensor_plan import PlannedTensor, TensorPlan

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class MergedTensors:
    """The tensors that :func:`pos2d.merge` would write, bit for bit.

    ``directory`` is the base's; ``opened`` are its files by name, ``planned`` the tensors by name.
    """

    directory: Path
    planned: Mapping[str, PlannedTensor]
    opened: Mapping[str, TensorFile]

    @property
    def files(self) -> Mapping[str, str]:
        """Tensor name to the file of the base that it is computed from."""
        return {name: tensor.source.file for name, tensor in self.planned.items()}

    def read(self, name: str, device: "torch.device", dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """Compute one tensor, on ``device`` and rounded once to ``dtype`` (the planned one if None).

        Raises:
            InputError: values that are not finite, or a base that changed while it was read.
        """
        import torch

        tensor = self.planned[name]
        if dtype is not None and tensor.deltas:
            tensor = replace(tensor, dtype=safetensors_name(str(dtype)))
        file = self.opened[tensor.source.file]
        result = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
        if tensor.copied:
            file.read_into(tensor.origin, tensor.source, 0, result.reshape(-1).view(torch.uint8).numpy().data)
            check_copied(tensor, result)
        else:
            # Products may differ in the last bit with the number of threads; a written merge uses one.
            with single_threaded_torch():
                for block, rounded in rounded_rows(tensor, file, Rounding()):
                    result[block.rows] = rounded
        return result.to(device=device, dtype=dtype)


@contextmanager
def merged_tensors(base: Checkpoint, plan: TensorPlan) -> Iterator[MergedTensors]:
    """The tensors of ``plan``, readable until the ``with`` block ends."""
    with opened(base.directory, base.files) as files:
        yield MergedTensors(base.directory, {tensor.name: tensor for tensor in plan.tensors}, files)
