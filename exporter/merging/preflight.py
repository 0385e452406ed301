"""The disk space and memory that a merge needs, checked before the first byte is written."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pos2d.errors import StorageError
from pos2d.exporter.artifact.staging import workspace_of
from pos2d.exporter.merging.shard_writer import COPY_BYTES
from pos2d.exporter.merging.shards import ShardLayout
from pos2d.sources.adapters import Adapter
from pos2d.sources.files.parallel import worker_count
from pos2d.sources.files.tensor_io import BLOCK_ELEMENTS
from pos2d.units import size_text

# Memory of the process before its first tensor: 0.26 GB measured with torch 2.13 for CPUs; CUDA builds take more.
INTERPRETER_BYTES = 300 << 20
# How many float64 arrays of the size of a block exist at once, at most: weights, delta, sum, rounding and comparisons.
BLOCK_COPIES = 10
# Room for configuration, tokenizer and the other small files next to the weights.
SIDECAR_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Needs:
    """What a merge needs and what the machine has, in bytes; ``disk`` counts only what is still to be written."""

    disk: int
    disk_free: int
    memory: int
    memory_available: int

    def check(self, output: Path) -> None:
        """Check that both suffice.

        Raises:
            StorageError: the disk or the memory is too small.
        """
        check_disk(output, self.disk, self.disk_free)
        if self.memory > self.memory_available:
            raise StorageError(
                f"the merge needs {size_text(self.memory)} of memory, {size_text(self.memory_available)} are "
                "available; close other programs"
            )


def needs_of(layout: ShardLayout, adapters: Sequence[Adapter], output: Path) -> Needs:
    """The needs of a merge; files that an interrupted run left in its workspace count as free disk space."""
    import psutil

    reusable = sum(path.stat().st_size for path in workspace_of(output).rglob("*") if path.is_file())
    # Full-size tensors of an adapter stay in their mapped file; low-rank factors are used for every block.
    deltas = (delta for adapter in adapters for of_tensor in adapter.deltas.values() for delta in of_tensor)
    factors = [tensor for delta in deltas if delta.rank is not None for tensor in delta.tensors().values()]
    per_worker = COPY_BYTES + BLOCK_COPIES * BLOCK_ELEMENTS * 8 + _widest_factors(layout)
    return Needs(
        disk=max(layout.nbytes - reusable, 0) + SIDECAR_BYTES,
        disk_free=disk_free(output),
        memory=INTERPRETER_BYTES + sum(tensor.nbytes for tensor in factors) + worker_count() * per_worker,
        memory_available=psutil.virtual_memory().available,
    )


def disk_free(output: Path) -> int:
    """Free bytes on the disk where ``output`` will be."""
    return shutil.disk_usage(next(parent for parent in output.absolute().parents if parent.is_dir())).free


def check_disk(output: Path, needed: int, free: int) -> None:
    """Check that ``needed`` bytes fit into ``free`` ones.

    Raises:
        StorageError: they do not.
    """
    if needed > free:
        raise StorageError(
            f"{output} needs {size_text(needed)}, its disk has {size_text(free)} free; "
            "make room or choose an output elsewhere"
        )


def _widest_factors(layout: ShardLayout) -> int:
    """The largest number of bytes that the factors of one tensor take in float64."""
    low_rank = ([delta for delta in tensor.deltas if delta.rank is not None] for tensor in layout.tensors)
    return max(sum(t.numel() * 8 for delta in deltas for t in delta.tensors().values()) for deltas in low_rank)
