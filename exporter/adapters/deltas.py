"""What an adapter adds to one tensor: pure maths on rows of it, in float64.

A delta gets rows of the base's tensor (``[n, in]``, or ``[n]`` of a vector) and returns what to add to them. The deltas
of one tensor are summed, so adapters can be weighted and stacked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """``weight`` scales the adapter; 1 is the adapter as it was trained."""

    weight: float

    @property
    def rank(self) -> int | None:
        """The rank of a low-rank delta, None for others."""
        return None

    def widened(self) -> Self:
        """The same delta with its factors in float64, so that they are converted once a tensor and not once a block."""
        if self.rank is None:
            return self
        wide: dict[str, Any] = {name: tensor.double() for name, tensor in self.tensors().items()}
        return replace(self, **wide)

    def tensors(self) -> "dict[str, torch.Tensor]":
        """The adapter's tensors by field."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("weight", "scale")}

    def of_rows(self, base: "torch.Tensor", rows: slice) -> "torch.Tensor":
        """What is added to ``base``, the float64 ``rows`` of the base's tensor; float64, of the same shape.

        Must be called on a widened delta.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True, eq=False)
class LowRank(Delta):
    """``weight * scale * b @ a`` with ``a`` ``[r, in]`` and ``b`` ``[out, r]``."""

    a: "torch.Tensor"
    b: "torch.Tensor"
    scale: float = 1.0

    @property
    def rank(self) -> int | None:
        return int(self.a.shape[0])

    def of_rows(self, base: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return (self.b[rows] * (self.weight * self.scale)) @ self.a


@dataclass(frozen=True, slots=True, eq=False)
class Dora(Delta):
    """DoRA (arXiv 2402.09353): rows of ``W + scale * b @ a`` are rescaled to the norms in ``magnitude`` ``[out]``."""

    a: "torch.Tensor"
    b: "torch.Tensor"
    magnitude: "torch.Tensor"
    scale: float = 1.0

    @property
    def rank(self) -> int | None:
        return int(self.a.shape[0])

    def of_rows(self, base: "torch.Tensor", rows: slice) -> "torch.Tensor":
        direction = base + (self.b[rows] * self.scale) @ self.a
        factors: torch.Tensor = self.magnitude[rows] / direction.norm(dim=1)
        return (direction * factors[:, None] - base) * self.weight


@dataclass(frozen=True, slots=True, eq=False)
class Added(Delta):
    """``weight * value``, with ``value`` of the tensor's shape."""

    value: "torch.Tensor"

    def of_rows(self, base: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return self.weight * self.value[rows].double()


@dataclass(frozen=True, slots=True, eq=False)
class Replaced(Delta):
    """``weight * (value - W)``: at weight 1, ``value`` replaces the tensor."""

    value: "torch.Tensor"

    def of_rows(self, base: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return self.weight * (self.value[rows].double() - base)


def exact_sum(base: "torch.Tensor", deltas: Sequence[Delta], rows: slice) -> tuple["torch.Tensor", "torch.Tensor"]:
    """``(W + D, D)`` for the float64 ``rows`` of a tensor, both float64; D is the sum of the widened ``deltas``."""
    first, *others = deltas
    delta = first.of_rows(base, rows)
    for other in others:
        delta = delta + other.of_rows(base, rows)
    # In floating point, W + (V - W) is not always V.
    replaced = not others and isinstance(first, Replaced) and first.weight == 1
    return (first.value[rows].double() if replaced else base + delta), delta  # type: ignore[attr-defined]
