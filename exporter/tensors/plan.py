"""What a merge will write: every shard with its header, and for every tensor where it comes from and goes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pos2d.errors import UsageError
from pos2d.exporter.adapters import Adapter
from pos2d.exporter.adapters.deltas import Change
from pos2d.exporter.inputs.checkpoint import (
    DTYPES,
    EMBEDDING,
    HEAD,
    SAFETENSORS_NAMES,
    SINGLE,
    WIDTHS,
    Checkpoint,
    TensorPlace,
)
from pos2d.exporter.tensors.tying import stays_tied


@dataclass(frozen=True, slots=True, eq=False)
class PlannedTensor:
    """``name`` is made from the base's ``origin`` at ``source`` and lies at ``target``.

    ``changes`` and the file names of the ``adapters`` that they come from may be empty.
    """

    name: str
    origin: str
    source: TensorPlace
    target: TensorPlace
    changes: tuple[Change, ...]
    adapters: tuple[str, ...]

    @property
    def copied(self) -> bool:
        """Whether its bytes are those of the base."""
        return not self.changes and self.source.dtype == self.target.dtype


@dataclass(frozen=True, slots=True, eq=False)
class PlannedShard:
    """One safetensors file: ``header`` and then its tensors without gaps."""

    file: str
    header: bytes
    tensors: tuple[PlannedTensor, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.target.nbytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True, eq=False)
class MergePlan:
    """All shards; ``tied`` is whether head and embedding are one tensor in the result."""

    shards: tuple[PlannedShard, ...]
    tied: bool

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def tensors(self) -> list[PlannedTensor]:
        return [tensor for shard in self.shards for tensor in shard.tensors]

    @property
    def dtype(self) -> str:
        """torch's name of the type of the linear weights."""
        return next(DTYPES[t.target.dtype][0] for t in self.tensors if t.name.endswith("_proj.weight"))

    def index(self) -> dict[str, object] | None:
        """Content of the index file, where there are several shards."""
        if len(self.shards) == 1:
            return None
        return index_of({tensor.name: tensor.target for tensor in self.tensors})


def index_of(places: Mapping[str, TensorPlace]) -> dict[str, object]:
    """Content of an index file."""
    return {
        "metadata": {"total_size": sum(place.nbytes for place in places.values())},
        "weight_map": {name: place.file for name, place in places.items()},
    }


def plan_merge(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    dtype: str = "auto",
    max_shard_size: str | None = None,
    untied: bool = False,
) -> MergePlan:
    """Lay out the result: in the base's files, or anew where ``max_shard_size`` (``5GB``) says so.

    ``dtype`` is ``auto`` (each tensor keeps the base's) or a torch name. ``untied`` makes a tied head a tensor of its
    own in any case.

    Raises:
        UsageError: a size that cannot be read.
    """
    changes = combined(adapters)
    tied = stays_tied(base, changes) and not untied
    origins = {name: name for name in base.tensors}
    if base.sizes.tied and not tied:
        origins[HEAD] = EMBEDDING
    places = {name: base.tensors[origin] for name, origin in origins.items()}
    types = {name: place.dtype if dtype == "auto" else SAFETENSORS_NAMES[dtype] for name, place in places.items()}
    sizes = {name: place.elements * DTYPES[types[name]][1] for name, place in places.items()}
    files = _files_of_base(places) if max_shard_size is None else split(sizes, max_shard_size)
    shards = []
    for file, names in files.items():
        header, targets = lay_out(file, {name: (types[name], places[name].shape) for name in names})
        tensors = tuple(
            PlannedTensor(
                name=name,
                origin=origins[name],
                source=places[name],
                target=targets[name],
                changes=tuple(changes.get(name, ())),
                adapters=tuple(adapter.path.name for adapter in adapters if name in adapter.changes),
            )
            for name in targets
        )
        shards.append(PlannedShard(file, header, tensors))
    return MergePlan(tuple(shards), tied)


def _files_of_base(places: Mapping[str, TensorPlace]) -> dict[str, list[str]]:
    """The base's files under safetensors names, a head that is no longer tied beside its embedding."""
    files: dict[str, list[str]] = {}
    for name, place in places.items():
        file = Path(place.file).with_suffix(".safetensors").name.replace("pytorch_model", "model", 1)
        files.setdefault(file, []).append(name)
    ordered = dict(sorted(files.items()))
    return {SINGLE: next(iter(ordered.values()))} if len(ordered) == 1 else ordered


def split(sizes: Mapping[str, int], max_shard_size: str) -> dict[str, list[str]]:
    from huggingface_hub import split_state_dict_into_shards_factory

    try:
        split = split_state_dict_into_shards_factory(
            dict(sizes),  # the factory asks for the size only, so sizes stand in for the tensors
            get_storage_size=int,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except (ValueError, OverflowError):
        raise UsageError(
            f"--max-shard-size {max_shard_size!r} cannot be read; give a size such as 5GB or 500MB"
        ) from None
    return split.filename_to_tensors


def lay_out(file: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, TensorPlace]]:
    """The header and every tensor's place, in the order that the safetensors library writes: wide types first, then
    by name, the header padded to eight bytes."""
    order = sorted(tensors, key=lambda name: (-WIDTHS[tensors[name][0]], _rank_of_type(tensors[name][0]), name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        starts[name] = end
        end += TensorPlace(file, shape, dtype).nbytes
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    places = {name: TensorPlace(file, tensors[name][1], tensors[name][0], len(header) + starts[name]) for name in order}
    return header, places


def _rank_of_type(dtype: str) -> int:
    """Types of one width: the library's own order."""
    return ["U8", "I8", "BF16", "F16", "F32", "F64"].index(dtype)


def combined(adapters: Sequence[Adapter]) -> dict[str, list[Change]]:
    """The changes of all adapters by tensor, in the order of the adapters."""
    changes: dict[str, list[Change]] = {}
    for adapter in adapters:
        for name, those in adapter.changes.items():
            changes.setdefault(name, []).extend(those)
    return changes
