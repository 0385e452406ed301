"""Sums over the elements of a tensor that say how much of its delta the stored values have."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DeltaStats:
    """Sums over ``elements``, with W the base's values, D the delta and W' the stored values.

    ``weight_square``: of W²; ``delta_square``: of D²; ``retained``: of (W' - W) D; ``error_square``: of (W' - W - D)²;
    ``changed``: how many elements of W' differ from W.
    """

    elements: int = 0
    weight_square: float = 0.0
    delta_square: float = 0.0
    retained: float = 0.0
    error_square: float = 0.0
    changed: int = 0

    def __add__(self, other: "DeltaStats") -> "DeltaStats":
        return DeltaStats(
            self.elements + other.elements,
            self.weight_square + other.weight_square,
            self.delta_square + other.delta_square,
            self.retained + other.retained,
            self.error_square + other.error_square,
            self.changed + other.changed,
        )

    @property
    def retention(self) -> float | None:
        """<W' - W, D> / <D, D>; None where D is zero."""
        return self.retained / self.delta_square if self.delta_square else None

    def figures(self) -> dict[str, float | None]:
        """``rms_weight`` to ``changed``, as :class:`pos2d.exporter.merging.ledger.TensorEntry` defines them."""
        rms_weight = math.sqrt(self.weight_square / self.elements)
        rms_delta = math.sqrt(self.delta_square / self.elements)
        return {
            "rms_weight": rms_weight,
            "rms_delta": rms_delta,
            "delta_ratio": rms_delta / rms_weight if rms_weight else None,
            "retention": self.retention,
            "error": math.sqrt(self.error_square / self.delta_square) if self.delta_square else None,
            "changed": self.changed / self.elements,
        }


def delta_stats(
    weight: "torch.Tensor", before: "torch.Tensor", delta: "torch.Tensor", stored: "torch.Tensor"
) -> DeltaStats:
    """Sums over rows of one tensor.

    ``weight``, ``before`` and ``delta`` are float64; ``before`` holds the values of ``weight`` in the stored type, so
    that a conversion by itself counts as no change.
    """
    import torch

    moved, d, w = (stored.double() - before).flatten(), delta.flatten(), weight.flatten()
    error = moved - d
    return DeltaStats(
        elements=w.numel(),
        weight_square=float(torch.dot(w, w)),
        delta_square=float(torch.dot(d, d)),
        retained=float(torch.dot(moved, d)),
        error_square=float(torch.dot(error, error)),
        changed=int(torch.count_nonzero(moved)),
    )
