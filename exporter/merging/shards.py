"""The safetensors files of a merge: planned tensors, laid out in the base's files or in shards of a chosen size."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pos2d.sources.checkpoints.checkpoint import Checkpoint
from pos2d.sources.checkpoints.weight_files import SINGLE
from pos2d.sources.files.safetensors_layout import index_of, lay_out, split
from pos2d.sources.files.tensor_places import TensorPlace
from pos2d.sources.tensors.tensor_plan import PlannedTensor, TensorPlan


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One safetensors file: ``header``, then ``tensors`` without gaps, each at its place by name."""

    file: str
    header: bytes
    tensors: tuple[PlannedTensor, ...]
    places: Mapping[str, TensorPlace]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True, eq=False)
class ShardLayout:
    """All shards of a merge."""

    shards: tuple[Shard, ...]

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def tensors(self) -> list[PlannedTensor]:
        return [tensor for shard in self.shards for tensor in shard.tensors]

    def index(self) -> dict[str, object] | None:
        """Content of the index file, or None for a single shard."""
        if len(self.shards) == 1:
            return None
        return index_of({name: place for shard in self.shards for name, place in shard.places.items()})


def lay_out_shards(plan: TensorPlan, base: Checkpoint, max_shard_size: str | None = None) -> ShardLayout:
    """Lay out ``plan`` in files named as the base's, or in new ones of at most ``max_shard_size`` (``5GB``).

    Raises:
        UsageError: a size that cannot be read.
    """
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    if max_shard_size is None:
        files = _files_of_base(plan)
    else:
        # Shards are filled in the order of the base's headers; a head that is no longer tied comes last.
        order = [*(name for name in base.tensors), *(name for name in tensors if name not in base.tensors)]
        files = split({name: tensors[name].nbytes for name in order}, max_shard_size)
    return ShardLayout(tuple(_shard(file, [tensors[name] for name in names]) for file, names in files.items()))


def _shard(file: str, tensors: list[PlannedTensor]) -> Shard:
    header, places = lay_out(file, {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors})
    by_name = {tensor.name: tensor for tensor in tensors}
    return Shard(file, header, tuple(by_name[name] for name in places), places)


def _files_of_base(plan: TensorPlan) -> dict[str, list[str]]:
    """The base's files under safetensors names; a head that is no longer tied is in the file of its embedding."""
    files: dict[str, list[str]] = {}
    for tensor in plan.tensors:
        file = Path(tensor.source.file).with_suffix(".safetensors").name.replace("pytorch_model", "model", 1)
        files.setdefault(file, []).append(tensor.name)
    ordered = dict(sorted(files.items()))
    return {SINGLE: next(iter(ordered.values()))} if len(ordered) == 1 else ordered
