"""The proof of a merge: for every tensor where it came from, what was added, and how much of that rounding kept."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from pos2d.manifest import Manifest

if TYPE_CHECKING:
    import torch

RETENTION_THRESHOLD = 0.9
Action = Literal["copied", "converted", "merged", "replaced"]
Ledger = Mapping[str, "TensorEntry"]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the result.

    ``action``: its bytes were copied, only its type converted, something was added, or it was replaced as a whole.
    ``sources``: the base's file, then the adapters. ``sha256_in``, ``sha256_out``: of the base's bytes and of the
    written ones. The figures are those of a change, absent where nothing was added: ``rank`` (of several low-rank
    changes their sum), ``rms_weight`` and ``rms_delta`` (root mean squares), ``delta_ratio`` (the second by the first),
    ``retention`` (<W' - W, D> / <D, D>: the part of the change D that the stored W' has; absent where D is zero),
    ``error`` (rms(W' - W - D) / rms(D): what rounding did to it) and ``changed`` (share of the values in which W' and W
    differ). W is the base in the stored type, so that a conversion by itself changes nothing.
    """

    file: str
    action: Action
    sources: tuple[str, ...]
    elements: int
    sha256_in: str
    sha256_out: str
    rank: int | None = None
    rms_weight: float | None = None
    rms_delta: float | None = None
    delta_ratio: float | None = None
    retention: float | None = None
    error: float | None = None
    changed: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Without the fields that are absent."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> "TensorEntry":
        """Inverse of :meth:`to_dict`; raises TypeError for other keys."""
        return cls(**{**block, "sources": tuple(block["sources"])})


@dataclass(frozen=True, slots=True)
class Totals:
    """The ledger in one line; the figures are over all changed tensors together, absent where there are none."""

    tensors: int
    copied: int
    converted: int
    merged: int
    replaced: int
    elements: int
    delta_ratio: float | None
    retention: float | None
    error: float | None
    changed: float | None


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums over the elements of a change, from which its figures follow."""

    elements: int = 0
    weight_square: float = 0.0
    delta_square: float = 0.0
    kept: float = 0.0
    error_square: float = 0.0
    changed: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.elements + other.elements,
            self.weight_square + other.weight_square,
            self.delta_square + other.delta_square,
            self.kept + other.kept,
            self.error_square + other.error_square,
            self.changed + other.changed,
        )

    def figures(self) -> dict[str, float | None]:
        """``rms_weight`` to ``changed`` as :class:`TensorEntry` has them."""
        rms_weight = math.sqrt(self.weight_square / self.elements)
        rms_delta = math.sqrt(self.delta_square / self.elements)
        return {
            "rms_weight": rms_weight,
            "rms_delta": rms_delta,
            "delta_ratio": rms_delta / rms_weight if rms_weight else None,
            "retention": self.kept / self.delta_square if self.delta_square else None,
            "error": math.sqrt(self.error_square / self.delta_square) if self.delta_square else None,
            "changed": self.changed / self.elements,
        }


def tally_of(weight: "torch.Tensor", before: "torch.Tensor", delta: "torch.Tensor", rounded: "torch.Tensor") -> Tally:
    """Of rows of one tensor; ``before`` is the weight in the type of ``rounded``, in float64 as the others."""
    import torch

    moved, d, w = (rounded.double() - before).flatten(), delta.flatten(), weight.flatten()
    error = moved - d
    return Tally(
        elements=w.numel(),
        weight_square=float(torch.dot(w, w)),
        delta_square=float(torch.dot(d, d)),
        kept=float(torch.dot(moved, d)),
        error_square=float(torch.dot(error, error)),
        changed=int(torch.count_nonzero(moved)),
    )


def read_ledger(manifest: Manifest) -> dict[str, TensorEntry]:
    """The ledger of a merged artifact; empty for others."""
    tensors = (manifest.ledger or {}).get("tensors", {})
    return {name: TensorEntry.from_dict(entry) for name, entry in tensors.items()}


def total(entries: Iterable[TensorEntry]) -> Totals:
    entries = list(entries)
    counts = {
        action: sum(entry.action == action for entry in entries)
        for action in ("copied", "converted", "merged", "replaced")
    }
    figures = _together(entries)
    return Totals(
        tensors=len(entries),
        **counts,
        elements=sum(entry.elements for entry in entries),
        delta_ratio=figures.get("delta_ratio"),
        retention=figures.get("retention"),
        error=figures.get("error"),
        changed=figures.get("changed"),
    )


def _together(entries: Sequence[TensorEntry]) -> dict[str, float | None]:
    """Figures of several changed tensors as if they were one."""
    tally = Tally()
    for entry in entries:
        if entry.rms_delta is not None and entry.rms_weight is not None and entry.changed is not None:
            delta_square = entry.rms_delta**2 * entry.elements
            tally += Tally(
                entry.elements,
                entry.rms_weight**2 * entry.elements,
                delta_square,
                (entry.retention or 0.0) * delta_square,
                (entry.error or 0.0) ** 2 * delta_square,
                round(entry.changed * entry.elements),
            )
    return tally.figures() if tally.elements else {}


def warnings(entries: Ledger, dtype: str) -> list[str]:
    """What a person should know before using the result, a sentence each."""
    touched = {name: entry for name, entry in entries.items() if entry.action == "merged"}
    still = sorted(name for name, entry in touched.items() if entry.rms_delta == 0)
    found: list[str] = []
    if still:
        found.append(
            f"the adapter changes nothing in {len(still)} of {len(touched)} tensors ({still[0]} is the first): factors "
            "that are all zero were never trained"
        )
    figures = _together(list(entries.values()))
    retention = figures.get("retention")
    if retention is not None and abs(retention - 1) > 1 - RETENTION_THRESHOLD:
        only = "only " if retention < 1 else ""
        found.append(
            f"{dtype} keeps {only}{retention:.0%} of the adapter, with an error of {_number(figures['error'], '.1f')} "
            "times its size: its steps are larger than many of the changes; use --dtype float32 or float16, or "
            "--rounding stochastic, which keeps all of it on average"
        )
    return found


def table(entries: Ledger) -> list[str]:
    """Lines for people: the changed tensors by kind, and how many were left alone."""
    kinds: dict[str, list[TensorEntry]] = {}
    for name, entry in entries.items():
        if entry.rms_delta is not None:
            kind = ".".join(name.split(".")[-2:]).removesuffix(".weight")
            kinds.setdefault(kind, []).append(entry)
    if not kinds:
        return []
    width = max(map(len, [*kinds, "module"]))
    lines = [
        f"{'module':{width}} {'tensors':>8} {'rank':>6} {'rms(delta)/rms(W)':>18} {'retention':>10} {'error':>8} "
        f"{'changed':>8}"
    ]
    for kind, those in sorted(kinds.items()) + ([("all", list(_changed(kinds)))] if len(kinds) > 1 else []):
        figures = _together(those)
        ranks = sorted({entry.rank for entry in those if entry.rank is not None})
        rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}" if ranks else "-"
        lines.append(
            f"{kind:{width}} {len(those):8} {rank:>6} {_number(figures['delta_ratio'], '.2e'):>18} "
            f"{_number(figures['retention'], '.1%'):>10} {_number(figures['error'], '.2g'):>8} "
            f"{_number(figures['changed'], '.1%'):>8}"
        )
    return lines


def _changed(kinds: Mapping[str, Sequence[TensorEntry]]) -> Iterable[TensorEntry]:
    return (entry for those in kinds.values() for entry in those)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
