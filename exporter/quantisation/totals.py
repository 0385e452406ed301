"""What quantising did to the weights of an artifact, in a few numbers."""

from collections.abc import Collection
from dataclasses import dataclass

from pos2d.exporter.merging.ledger import Tally


@dataclass(frozen=True, slots=True)
class QuantTotals:
    """``quantised`` of ``tensors`` weights.

    ``noise``: rms(Q - W - D) / rms(W) of the quantised ones, Q being what a loader computes with, W the base and D what
    adapters add; ``retention``: <Q - W, D> / <D, D>, absent where nothing is added.
    """

    tensors: int
    quantised: int
    noise: float
    retention: float | None


def totals_of(tallies: Collection[Tally], tensors: int) -> QuantTotals:
    """From the sums over every quantised weight, of ``tensors`` in all."""
    total = sum(tallies, Tally())
    return QuantTotals(
        tensors=tensors,
        quantised=len(tallies),
        noise=(total.error_square / total.weight_square) ** 0.5 if total.weight_square else 0.0,
        retention=total.kept / total.delta_square if total.delta_square else None,
    )
