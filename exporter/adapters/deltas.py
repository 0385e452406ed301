"""What an adapter does to one tensor: pure maths on rows of it, in float64.

A change is given the base's rows (``[n, in]``, or ``[n]`` of a vector) and says what to add to them. The changes of one
tensor are summed, so adapters can be weighted and stacked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """``weight`` is how much of the adapter is wanted, 1 for all of it."""

    weight: float

    @property
    def rank(self) -> int | None:
        return None

    def widened(self) -> Self:
        """The same change with its factors in float64: converted once a tensor, and not once a block."""
        if self.rank is None:
            return self
        wide: dict[str, Any] = {name: tensor.double() for name, tensor in self.tensors().items()}
        return replace(self, **wide)

    def tensors(self) -> "dict[str, torch.Tensor]":
        """The adapter's tensors by field."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("weight", "scale")}

    def delta(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        """Float64, of the shape of ``weight``, the base's float64 ``rows``; called on a widened change."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, eq=False)
class LowRank(Change):
    """``weight * scale * b @ a`` with ``a`` ``[r, in]`` and ``b`` ``[out, r]``."""

    a: "torch.Tensor"
    b: "torch.Tensor"
    scale: float = 1.0

    @property
    def rank(self) -> int | None:
        return int(self.a.shape[0])

    def delta(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return (self.b[rows] * (self.weight * self.scale)) @ self.a


@dataclass(frozen=True, slots=True, eq=False)
class Dora(Change):
    """DoRA (arXiv 2402.09353): every row of ``W + scale * b @ a`` is stretched to its ``magnitude`` ``[out]``."""

    a: "torch.Tensor"
    b: "torch.Tensor"
    magnitude: "torch.Tensor"
    scale: float = 1.0

    @property
    def rank(self) -> int | None:
        return int(self.a.shape[0])

    def delta(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        direction = weight + (self.b[rows] * self.scale) @ self.a
        stretch: torch.Tensor = self.magnitude[rows] / direction.norm(dim=1)
        return (direction * stretch[:, None] - weight) * self.weight


@dataclass(frozen=True, slots=True, eq=False)
class Added(Change):
    """``weight * value``, of the tensor's own shape."""

    value: "torch.Tensor"

    def delta(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return self.weight * self.value[rows].double()


@dataclass(frozen=True, slots=True, eq=False)
class Replaced(Change):
    """``value`` in place of the tensor, or as much of the way there as ``weight`` says."""

    value: "torch.Tensor"

    def delta(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return self.weight * (self.value[rows].double() - weight)


def exact_sum(weight: "torch.Tensor", changes: Sequence[Change], rows: slice) -> tuple["torch.Tensor", "torch.Tensor"]:
    """``(W + all changes, all changes)`` of the float64 ``rows`` of a tensor, both float64; ``changes`` are widened."""
    first, *others = changes
    delta = first.delta(weight, rows)
    for change in others:
        delta = delta + change.delta(weight, rows)
    # W + (V - W) is not always V.
    whole = not others and isinstance(first, Replaced) and first.weight == 1
    return (first.value[rows].double() if whole else weight + delta), delta  # type: ignore[attr-defined]
