"""What every tensor of a result is: its source in the base, what is added to it, its dtype and its shape."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from pos2d.dtypes import ITEM_BYTES, SAFETENSORS_NAMES, TORCH_NAMES
from pos2d.sources.adapters import Adapter
from pos2d.sources.adapters.deltas import Delta
from pos2d.sources.checkpoints.checkpoint import EMBEDDING, HEAD, Checkpoint
from pos2d.sources.files.safetensors_layout import layout_order
from pos2d.sources.files.tensor_places import TensorPlace
from pos2d.sources.tensors.tying import stays_tied


@dataclass(frozen=True, slots=True, eq=False)
class PlannedTensor:
    """The tensor ``name``, computed from the base's tensor ``origin`` at ``source``.

    ``dtype`` is the safetensors name of the target type. ``deltas`` and the file names of the ``adapters`` that they
    come from are empty where nothing is added.
    """

    name: str
    origin: str
    source: TensorPlace
    dtype: str
    deltas: tuple[Delta, ...]
    adapters: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def nbytes(self) -> int:
        """Bytes in the target type."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def copied(self) -> bool:
        """Whether its bytes are those of the base."""
        return not self.deltas and self.source.dtype == self.dtype


@dataclass(frozen=True, slots=True, eq=False)
class TensorPlan:
    """All tensors of a result, by file of the base and then in safetensors order.

    ``tied``: whether head and embedding are one tensor in the result.
    """

    tensors: tuple[PlannedTensor, ...]
    tied: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def dtype(self) -> str:
        """torch's name of the dtype of the linear weights."""
        return next(TORCH_NAMES[tensor.dtype] for tensor in self.tensors if tensor.name.endswith("_proj.weight"))


def plan_tensors(
    base: Checkpoint, adapters: Sequence[Adapter], dtype: str = "auto", untied: bool = False
) -> TensorPlan:
    """Plan the sum of ``base`` and ``adapters``.

    ``dtype`` is ``auto`` (each tensor keeps the base's) or a torch name. ``untied`` makes a tied head a tensor of its
    own even where nothing changes it.
    """
    deltas = deltas_by_tensor(adapters)
    tied = stays_tied(base, deltas) and not untied
    origins = {name: name for name in base.tensors}
    if base.sizes.tied and not tied:
        origins[HEAD] = EMBEDDING
    tensors = [
        PlannedTensor(
            name=name,
            origin=origin,
            source=base.tensors[origin],
            dtype=base.tensors[origin].dtype if dtype == "auto" else SAFETENSORS_NAMES[dtype],
            deltas=tuple(deltas.get(name, ())),
            adapters=tuple(adapter.name for adapter in adapters if name in adapter.deltas),
        )
        for name, origin in origins.items()
    ]
    tensors.sort(key=lambda tensor: (tensor.source.file, layout_order(tensor.name, tensor.dtype)))
    return TensorPlan(tuple(tensors), tied)


def deltas_by_tensor(adapters: Sequence[Adapter]) -> dict[str, list[Delta]]:
    """Tensor name to the deltas of all adapters, in the order of the adapters."""
    deltas: dict[str, list[Delta]] = {}
    for adapter in adapters:
        for name, added in adapter.deltas.items():
            deltas.setdefault(name, []).extend(added)
    return deltas
