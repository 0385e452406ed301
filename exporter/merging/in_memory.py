"""A merge that is not written: its tensors, each made when a loader asks for it and kept nowhere."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pos2d.exporter.files.parallel import single_threaded_torch
from pos2d.exporter.files.tensor_io import TensorFile, opened
from pos2d.exporter.inputs.checkpoint import DTYPES, Checkpoint
from pos2d.exporter.merging.rounded_rows import check_copied, rounded_rows
from pos2d.exporter.tensors.plan import MergePlan, PlannedTensor
from pos2d.exporter.tensors.rounding import Rounding

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class MergedTensors:
    """What :func:`pos2d.merge` would write, bit for bit; ``directory`` is the base's, whose files are ``opened``."""

    directory: Path
    planned: Mapping[str, PlannedTensor]
    opened: Mapping[str, TensorFile]

    @property
    def files(self) -> Mapping[str, str]:
        """The base's file for every tensor of the result."""
        return {name: tensor.source.file for name, tensor in self.planned.items()}

    def read(self, name: str, device: "torch.device", dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """Raises:
        InputError: values that are not finite, or a base that changed while it was read.
        """
        import torch

        tensor = self.planned[name]
        file = self.opened[tensor.source.file]
        result = torch.empty(tensor.target.shape, dtype=getattr(torch, DTYPES[tensor.target.dtype][0]))
        if tensor.copied:
            file.read_into(tensor.origin, tensor.source, 0, result.reshape(-1).view(torch.uint8).numpy().data)
            check_copied(tensor, result)
        else:
            with single_threaded_torch():  # as a merge computes: products may differ in a last bit with their threads
                for block in rounded_rows(tensor, file, Rounding()):
                    result[block.rows] = block.rounded
        return result.to(device=device, dtype=dtype)


@contextmanager
def merged_tensors(base: Checkpoint, plan: MergePlan) -> Iterator[MergedTensors]:
    """The tensors of ``plan``, as long as the block lasts."""
    with opened(base.directory, base.files) as files:
        yield MergedTensors(base.directory, {tensor.name: tensor for tensor in plan.tensors}, files)
