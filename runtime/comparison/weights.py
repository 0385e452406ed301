"""What an artifact's weights say: how much of the adapter is in each tensor, and which tensors are not the base's."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pos2d.bnb_format import INT8_STEPS, NF4_ABSMAX, NF4_CODE, NF4_STATE, SCALES, WEIGHT
from pos2d.dtypes import TORCH_NAMES
from pos2d.progress import Progress
from pos2d.runtime.opening.opened_model import OpenedModel

if TYPE_CHECKING:
    import torch

    from pos2d.runtime.backends.torch.weights import TensorSource
    from pos2d.sources.source import Source
    from pos2d.sources.tensors.tensor_plan import PlannedTensor

BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorEvidence:
    """Sums over one tensor: ``W`` of the base, ``D`` what the adapters add, ``V`` of the artifact, ``R`` the exact sum
    rounded to the artifact's type, and ``T`` the sum in that type of ``W`` and ``D``, which rounds ``W`` before.

    ``stored``: the type in which the artifact has it, or how it is quantised. ``along`` is ``<V - W, D>``,
    ``rounded_along`` ``<R - W, D>`` and ``typed_along`` ``<T - W, D>``; ``delta`` is ``|D|^2``, ``weight`` ``|W|^2``,
    ``moved`` ``|V - W|^2``, ``error`` ``|V - W - D|^2`` and ``rounded_error`` ``|R - W - D|^2``.
    """

    name: str
    stored: str
    elements: int
    along: float
    rounded_along: float
    typed_along: float
    delta: float
    weight: float
    moved: float
    error: float
    rounded_error: float

    @property
    def is_adapted(self) -> bool:
        return self.delta > 0

    @property
    def is_quantised(self) -> bool:
        return self.stored not in TORCH_NAMES.values()

    @property
    def strength(self) -> float:
        """The part of the adapter that is in the tensor: 0 none of it, 1 the adapter as trained, 2 twice."""
        return self.along / self.delta

    @property
    def possible(self) -> float:
        """The strength that rounding the exact sum once gives; of a quantised tensor, 1."""
        return 1.0 if self.is_quantised else self.rounded_along / self.delta

    @property
    def in_type(self) -> float:
        """The strength that merging in the stored type gives; of a quantised tensor, 1."""
        return 1.0 if self.is_quantised else self.typed_along / self.delta

    @property
    def uncertainty(self) -> float:
        """The standard error of the strength, where what is beside the adapter is noise."""
        return float((self.beside / self.delta / self.elements) ** 0.5)

    @property
    def beside(self) -> float:
        """``|V - W - p D|^2`` with the strength p: what is neither base nor adapter."""
        return max(self.moved - self.along**2 / self.delta, 0.0) if self.is_adapted else self.moved


@dataclass(frozen=True, slots=True)
class WeightEvidence:
    """Every tensor that base and artifact have, and the names of those of another shape or in one of the two alone."""

    tensors: tuple[TensorEvidence, ...]
    unlike: tuple[str, ...] = ()

    @property
    def adapted(self) -> list[TensorEvidence]:
        return [tensor for tensor in self.tensors if tensor.is_adapted]

    @property
    def others(self) -> list[TensorEvidence]:
        """The tensors that the adapters leave as they are, without quantised ones."""
        return [tensor for tensor in self.tensors if not tensor.is_adapted and not tensor.is_quantised]


def weigh(source: "Source", artifact: OpenedModel) -> WeightEvidence:
    """Compare the weights of an artifact on torch with those of a base and its adapters, tensor by tensor.

    Raises:
        InputError: weights that cannot be read, or values that are not finite.
    """
    from pos2d.sources.checkpoints.checkpoint import EMBEDDING, HEAD
    from pos2d.sources.files.tensor_io import opened as opened_files
    from pos2d.sources.tensors.tensor_plan import plan_tensors

    plan = plan_tensors(source.base, source.adapters)
    found: list[TensorEvidence] = []
    unlike: list[str] = []
    with (
        opened_files(source.base.directory, source.base.files) as files,
        _weights(artifact) as (names, read),
        Progress("comparing weights", len(plan.tensors)) as progress,
    ):
        planned = {tensor.name: tensor for tensor in plan.tensors}
        for name, tensor in planned.items():
            # A tied head has no tensor of its own.
            there = name if name in names else EMBEDDING if name == HEAD else None
            value, stored = read(there) if there in names else (None, "")
            if value is not None and name in (EMBEDDING, HEAD):
                value = value[: tensor.shape[0]]  # rows that pad the vocabulary are no token's
            if value is None or tuple(value.shape) != tensor.shape:
                unlike.append(name)
            else:
                found.append(_evidence(tensor, value, stored, files[tensor.source.file]))
            progress.advance()
    unlike += sorted(names - set(planned) - {HEAD})
    return WeightEvidence(tuple(found), tuple(unlike))


def _evidence(tensor: "PlannedTensor", value: "torch.Tensor", stored: str, file: Any) -> TensorEvidence:
    import torch

    from pos2d.sources.tensors.exact_rows import exact_rows
    from pos2d.sources.tensors.rounding import round_nearest

    sums = torch.zeros(8, dtype=torch.float64)
    dtype = getattr(torch, stored, torch.float64)
    for block in exact_rows(tensor, file, BLOCK_ELEMENTS):
        moved = value[block.rows].double() - block.weight
        delta = block.delta if block.delta is not None else torch.zeros_like(moved)
        rounded = round_nearest(block.exact, dtype).double() - block.weight
        typed = round_nearest(block.weight.to(dtype).double() + delta, dtype).double() - block.weight
        sums += torch.stack(
            [
                (moved * delta).sum(),
                (rounded * delta).sum(),
                (typed * delta).sum(),
                delta.square().sum(),
                block.weight.square().sum(),
                moved.square().sum(),
                (moved - delta).square().sum(),
                (rounded - delta).square().sum(),
            ]
        )
    return TensorEvidence(tensor.name, stored, value.numel(), *sums.tolist())


@contextmanager
def _weights(artifact: OpenedModel) -> "Iterator[tuple[set[str], Any]]":
    """The names of an artifact's weights, and a function that reads one in floating point with how it is stored."""
    import torch

    from pos2d.runtime.backends.torch.weights import opened_weights

    with opened_weights(artifact, "auto", quantised=False) as (_, tensors):
        parts = (f".{SCALES}", f".{NF4_ABSMAX}", f".{NF4_CODE}", f".{NF4_STATE}", ".weight_format")
        names = {name for name in tensors.files if not name.endswith(parts)}

        def read(name: str) -> "tuple[torch.Tensor, str]":
            module = name.removesuffix(f".{WEIGHT}")
            if f"{module}.{SCALES}" in tensors.files:
                return _int8(tensors, module), "8bit"
            if f"{module}.{NF4_ABSMAX}" in tensors.files:
                return _nf4(tensors, module), "nf4"
            value = tensors.read(name, torch.device("cpu"))
            return value, str(value.dtype).removeprefix("torch.")

        yield names, read


def _int8(tensors: "TensorSource", module: str) -> "torch.Tensor":
    import torch

    cpu = torch.device("cpu")
    scales = tensors.read(f"{module}.{SCALES}", cpu).double()
    return tensors.read(f"{module}.{WEIGHT}", cpu).double() * scales[:, None] / INT8_STEPS


def _nf4(tensors: "TensorSource", module: str) -> "torch.Tensor":
    import torch

    from pos2d.runtime.backends.torch.bitsandbytes_library import bitsandbytes
    from pos2d.runtime.backends.torch.linears import stored_linear

    parts: Mapping[str, torch.Tensor] = {
        part: tensors.read(f"{module}.{part}", torch.device("cpu"))
        for part in (WEIGHT, NF4_ABSMAX, NF4_CODE, NF4_STATE)
    }
    layer: Any = stored_linear(parts, "nf4", "auto", torch.float32)
    value: torch.Tensor = bitsandbytes().functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return value
