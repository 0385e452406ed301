"""What an adapter adds to one tensor: pure maths on rows of it, in float64.

A delta gets rows of a tensor (``[n, in]``, or ``[n]`` of a vector) and returns what to add to them. The deltas of one
step are summed, each computed from the same values, so adapters can be weighted and stacked. The deltas of a later step
are computed from the result of the step before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Self

from pos2d.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """``weight`` scales the adapter; 1 is the adapter as it was trained. ``step``: its place in a chain of adapters."""

    weight: float
    step: int = field(default=0, kw_only=True)

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

    @property
    def height(self) -> int | None:
        """How many rows the delta was trained with; None if it does not depend on that."""
        return None

    def tensors(self) -> "dict[str, torch.Tensor]":
        """The adapter's tensors by field."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("weight", "step", "scale")}

    def of_rows(self, base: "torch.Tensor", rows: slice) -> "torch.Tensor":
        """What is added to ``base``, the float64 ``rows`` of the tensor before this step; float64, of the same shape.

        Must be called on a widened delta.
        """
        raise NotImplementedError

    def result(self, base: "torch.Tensor", rows: slice) -> "torch.Tensor | None":
        """The rows after a step of this delta alone, where they are known without a sum; None where they are not.

        In floating point, W + (V - W) is not always V.
        """
        return None


@dataclass(frozen=True, slots=True, eq=False)
class Factors(Delta):
    """A delta that has a product ``b @ a`` with ``a`` ``[r, in]`` and ``b`` ``[out, r]``."""

    a: "torch.Tensor"
    b: "torch.Tensor"

    @property
    def rank(self) -> int | None:
        return int(self.a.shape[0])

    @property
    def height(self) -> int | None:
        return int(self.b.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class LowRank(Factors):
    """``weight * scale * b @ a``."""

    scale: float = 1.0

    def of_rows(self, base: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return (self.b[rows] * (self.weight * self.scale)) @ self.a


@dataclass(frozen=True, slots=True, eq=False)
class Dora(Factors):
    """DoRA (arXiv 2402.09353): rows of ``W + scale * b @ a`` are rescaled to the norms in ``magnitude`` ``[out]``.

    A row of zeros has no direction. It stays zero where its magnitude is zero; any other magnitude is refused.
    """

    magnitude: "torch.Tensor"
    scale: float = 1.0

    def of_rows(self, base: "torch.Tensor", rows: slice) -> "torch.Tensor":
        direction = base + (self.b[rows] * self.scale) @ self.a
        norms, magnitude = direction.norm(dim=1), self.magnitude[rows]
        empty = norms == 0
        if (magnitude[empty] != 0).any():
            first = (rows.start or 0) + int((empty & (magnitude != 0)).nonzero()[0])
            raise InputError(
                f"row {first} is zero, so that it has no direction that DoRA (use_dora) could scale to the magnitude "
                f"{float(magnitude[first - (rows.start or 0)]):g}; exclude this module from target_modules, or train "
                "without use_dora"
            )
        factors: torch.Tensor = magnitude / norms.masked_fill(empty, 1.0)
        return (direction * factors[:, None] - base) * self.weight


@dataclass(frozen=True, slots=True, eq=False)
class Added(Delta):
    """``weight * value``, with ``value`` of the tensor's shape."""

    value: "torch.Tensor"

    @property
    def height(self) -> int | None:
        return int(self.value.shape[0])

    def of_rows(self, base: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return self.weight * self.value[rows].double()


@dataclass(frozen=True, slots=True, eq=False)
class Replaced(Delta):
    """``weight * (value - W)``: at weight 1, ``value`` replaces the tensor."""

    value: "torch.Tensor"

    @property
    def height(self) -> int | None:
        return int(self.value.shape[0])

    def of_rows(self, base: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return self.weight * (self.value[rows].double() - base)

    def result(self, base: "torch.Tensor", rows: slice) -> "torch.Tensor | None":
        return self.value[rows].double() if self.weight == 1 else None


@dataclass(frozen=True, slots=True, eq=False)
class ReplacedRows(Delta):
    """``weight * (value - W)`` in the rows ``indices`` ``[n]``, with ``value`` ``[n, in]``; nothing elsewhere."""

    indices: "torch.Tensor"
    value: "torch.Tensor"

    def of_rows(self, base: "torch.Tensor", rows: slice) -> "torch.Tensor":
        import torch

        there, value = self._within(base, rows)
        delta = torch.zeros_like(base)
        delta[there] = self.weight * (value - base[there])
        return delta

    def result(self, base: "torch.Tensor", rows: slice) -> "torch.Tensor | None":
        if self.weight != 1:
            return None
        there, value = self._within(base, rows)
        result = base.clone()
        result[there] = value
        return result

    def _within(self, base: "torch.Tensor", rows: slice) -> "tuple[torch.Tensor, torch.Tensor]":
        """Which rows of ``base`` are replaced, and their float64 values."""
        local = self.indices - (rows.start or 0)
        inside = (local >= 0) & (local < len(base))
        return local[inside], self.value[inside].double()


def exact_sum(base: "torch.Tensor", deltas: Sequence[Delta], rows: slice) -> tuple["torch.Tensor", "torch.Tensor"]:
    """``(W + D, D)`` for the float64 ``rows`` of a tensor, both float64; D is what the widened ``deltas`` add in all.

    ``deltas`` are in the order of their steps.
    """
    current, delta = base, None
    for _, group in groupby(deltas, key=lambda delta: delta.step):
        after, added = _step(current, list(group), rows)
        delta = added if current is base else after - base
        current = after
    return current, current - base if delta is None else delta


def _step(base: "torch.Tensor", deltas: Sequence[Delta], rows: slice) -> tuple["torch.Tensor", "torch.Tensor"]:
    """The rows after one step, and what it adds to them."""
    first, *others = deltas
    result = first.result(base, rows) if not others and _covers(first, rows) else None
    if result is not None:
        return result, result - base
    delta = _of_rows(first, base, rows)
    for other in others:
        delta = delta + _of_rows(other, base, rows)
    return base + delta, delta


def _covers(delta: Delta, rows: slice) -> bool:
    return delta.height is None or rows.stop is None or rows.stop <= delta.height


def _of_rows(delta: Delta, base: "torch.Tensor", rows: slice) -> "torch.Tensor":
    """What ``delta`` adds to ``rows``, of which it may have been trained without the last ones: to those, nothing."""
    import torch

    if _covers(delta, rows):
        return delta.of_rows(base, rows)
    result = torch.zeros_like(base)
    known = max((delta.height or 0) - rows.start, 0)
    if known:
        result[:known] = delta.of_rows(base[:known], slice(rows.start, rows.start + known))
    return result
