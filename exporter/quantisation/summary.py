"""How far the quantised weights of an artifact are from the exact ones, in a few numbers."""

from collections.abc import Collection
from dataclasses import dataclass

from pos2d.sources.tensors.stats import DeltaStats


@dataclass(frozen=True, slots=True)
class QuantisationSummary:
    """How many of all ``tensors`` are ``quantised``, and the figures of those, as manifests have them.

    With ``W`` the base, ``D`` the change by the adapters and ``Q`` the stored values, over all quantised tensors:
    ``noise`` is the relative error ``rms(Q - W - D) / rms(W)``, and ``retention`` the part of the change that is
    stored, ``<Q - W, D> / <D, D>`` (None without a change).
    """

    tensors: int
    quantised: int
    noise: float
    retention: float | None


def summarise(stats: Collection[DeltaStats], tensors: int) -> QuantisationSummary:
    """Summarise the sums over each quantised tensor; ``tensors`` counts all of them."""
    total = sum(stats, DeltaStats())
    return QuantisationSummary(
        tensors=tensors,
        quantised=len(stats),
        noise=(total.error_square / total.weight_square) ** 0.5 if total.weight_square else 0.0,
        retention=total.retention,
    )


def rounding_totals(stats: Collection[DeltaStats], tensors: int) -> dict[str, float | None]:
    """The figures of a checkpoint in floating point: ``stats`` are the sums over each tensor that adapters change."""
    total = sum(stats, DeltaStats())
    return {"tensors": tensors, "merged": len(stats)} | (total.figures() if total.elements else {})
