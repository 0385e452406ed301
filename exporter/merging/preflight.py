"""What a merge needs of the machine, counted before the first byte is written."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pos2d.errors import StorageError
from pos2d.exporter.adapters import Adapter
from pos2d.exporter.artifact.staging import workspace_of
from pos2d.exporter.files.parallel import worker_count
from pos2d.exporter.files.tensor_io import BLOCK_ELEMENTS
from pos2d.exporter.merging.writer import COPY_BYTES
from pos2d.exporter.tensors.plan import MergePlan

# What the process has before its first tensor: measured with torch 2.13 for CPUs at 0.26 GB; its CUDA builds take more.
INTERPRETER_BYTES = 300 << 20
# Float64 values of a block that are alive at once, at most: weights, change, sum, rounding and their comparisons.
BLOCK_COPIES = 10
# Configuration, tokenizer and what else travels beside the weights.
COMPANION_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Needs:
    """All in bytes; ``disk`` is what is still to be written."""

    disk: int
    disk_free: int
    memory: int
    memory_available: int

    def check(self, output: Path) -> None:
        """Raises:
        StorageError: the disk or the memory is too small.
        """
        check_disk(output, self.disk, self.disk_free)
        if self.memory > self.memory_available:
            raise StorageError(
                f"the merge needs {_gigabytes(self.memory)} of memory, {_gigabytes(self.memory_available)} are "
                "available; close other programs"
            )


def needs_of(plan: MergePlan, adapters: Sequence[Adapter], output: Path) -> Needs:
    """The needs of ``plan``; what an interrupted run left beside ``output`` is used again or makes room."""
    import psutil

    left = sum(path.stat().st_size for path in workspace_of(output).rglob("*") if path.is_file())
    # Whole tensors stay in their file, mapped; factors are used again and again.
    changes = (change for adapter in adapters for those in adapter.changes.values() for change in those)
    factors = [tensor for change in changes if change.rank is not None for tensor in change.tensors().values()]
    return Needs(
        disk=max(plan.nbytes - left, 0) + COMPANION_BYTES,
        disk_free=disk_free(output),
        memory=INTERPRETER_BYTES
        + sum(tensor.nbytes for tensor in factors)
        + worker_count() * (COPY_BYTES + BLOCK_COPIES * BLOCK_ELEMENTS * 8 + _widest(plan)),
        memory_available=psutil.virtual_memory().available,
    )


def disk_free(output: Path) -> int:
    """Bytes, where ``output`` is going to be."""
    return shutil.disk_usage(next(parent for parent in output.absolute().parents if parent.is_dir())).free


def check_disk(output: Path, needed: int, free: int) -> None:
    """Raises:
    StorageError: ``output`` needs more bytes than its disk has free.
    """
    if needed > free:
        raise StorageError(
            f"{output} needs {_gigabytes(needed)}, its disk has {_gigabytes(free)} free; "
            "make room or choose an output elsewhere"
        )


def _widest(plan: MergePlan) -> int:
    """Bytes of the largest tensor's factors in float64."""
    changes = ([change for change in tensor.changes if change.rank is not None] for tensor in plan.tensors)
    return max(sum(t.numel() * 8 for change in those for t in change.tensors().values()) for those in changes)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
