"""Measures with their bars, and the table that a serving benchmark ends with."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """A figure and the bar that it should reach; a figure that could not be measured does not reach it."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def holds(self) -> bool:
        if math.isnan(self.value):
            return False
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )

    @property
    def bar(self) -> str:
        parts = [f">= {self.at_least:g}"] if self.at_least is not None else []
        return " ".join(parts + ([f"<= {self.at_most:g}"] if self.at_most is not None else []))

    def as_dict(self) -> dict[str, Any]:
        value = None if math.isnan(self.value) else self.value
        return {"name": self.name, "value": value, "bar": self.bar, "holds": self.holds}


def ratio(value: float, base: float) -> float:
    """NaN where there is nothing to compare with."""
    return value / base if base else math.nan


def table(figures: Mapping[str, Any], checks: Sequence[Check]) -> str:
    """Where it ran, the pace of every load, the other figures, and a line for each check."""
    lines = [f"{figures['processor']}; {figures['artifact']}; {_short(figures['settings'])}", ""]
    if paces := figures.get("paces"):
        lines.append(
            f"{'load':16} {'first token ms p50':>18} {'p95':>8} {'between ms p50':>14} {'p95':>7} "
            f"{'tokens/s':>8} {'requests/s':>10} {'failed':>6}"
        )
        lines += [
            f"{name:16} {pace['first_token_p50']:18.0f} {pace['first_token_p95']:8.0f} {pace['between_p50']:14.1f} "
            f"{pace['between_p95']:7.1f} {pace['tokens_per_s']:8.0f} {pace['requests_per_s']:10.2f} {pace['failed']:6}"
            for name, pace in paces.items()
        ]
    others = {name: value for name, value in figures.items() if name not in {"processor", "artifact", "settings"}}
    lines += [f"{name}: {_short(value)}" for name, value in others.items() if name != "paces"]
    return "\n".join([*lines, "", *verdicts(checks)])


def verdicts(checks: Sequence[Check]) -> list[str]:
    """A line for each check: the figure, the bar and whether it holds."""
    width = max(len(check.name) for check in checks)
    return [
        f"{check.name:{width}} {check.value:10.3g} {check.bar:>8} {'holds' if check.holds else 'FAILS'}"
        for check in checks
    ]


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_short(each)}" for name, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_short(each) for each in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
