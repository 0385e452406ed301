"""The record of a merge: for every tensor its sources, its hashes, and how much of its delta rounding retained."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pos2d.errors import InputError
from pos2d.manifest import Manifest
from pos2d.sources.tensors.stats import DeltaStats

RETENTION_THRESHOLD = 0.9
Action = Literal["copied", "converted", "merged", "replaced"]
Ledger = Mapping[str, "TensorEntry"]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the result.

    ``action``: its bytes were copied, only its type was converted, a delta was added, or it was replaced as a whole.
    ``sources``: the base's file, then the adapters. ``sha256_in``, ``sha256_out``: of the base's bytes and of the
    written ones. The other fields are None where nothing was added: ``rank`` (the sum of the ranks of all low-rank
    deltas), ``rms_weight`` and ``rms_delta`` (root mean squares), ``delta_ratio`` (the second by the first),
    ``retention`` (<W' - W, D> / <D, D>: the part of the delta D that the stored W' has; None where D is zero),
    ``error`` (rms(W' - W - D) / rms(D): the error of rounding) and ``changed`` (the share of elements in which W' and W
    differ). W is the base in the stored type, so that a conversion alone counts as no change.
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
        """The fields that are not None."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> "TensorEntry":
        """Inverse of :meth:`to_dict`; raises TypeError for other keys."""
        return cls(**{**block, "sources": tuple(block["sources"])})


@dataclass(frozen=True, slots=True)
class Totals:
    """The ledger in one line; the figures are over all changed tensors together, None if there are none."""

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


def read_ledger(manifest: Manifest) -> dict[str, TensorEntry]:
    """The ledger of a merged artifact; empty for other kinds.

    Raises:
        InputError: an entry that cannot be read.
    """
    tensors = (manifest.ledger or {}).get("tensors", {})
    try:
        return {name: TensorEntry.from_dict(entry) for name, entry in tensors.items()}
    except (KeyError, TypeError) as error:
        raise InputError(f"manifest: ledger cannot be read ({error!r}); make the artifact again") from None


def total(entries: Iterable[TensorEntry]) -> Totals:
    """Count ``entries`` by action and compute their common figures."""
    entries = list(entries)
    counts = {
        action: sum(entry.action == action for entry in entries)
        for action in ("copied", "converted", "merged", "replaced")
    }
    figures = _combined_figures(entries)
    return Totals(
        tensors=len(entries),
        **counts,
        elements=sum(entry.elements for entry in entries),
        delta_ratio=figures.get("delta_ratio"),
        retention=figures.get("retention"),
        error=figures.get("error"),
        changed=figures.get("changed"),
    )


def warnings(entries: Ledger, dtype: str) -> list[str]:
    """One sentence for each thing that a person should know before using the result."""
    merged = {name: entry for name, entry in entries.items() if entry.action == "merged"}
    unchanged = sorted(name for name, entry in merged.items() if entry.rms_delta == 0)
    sentences: list[str] = []
    if unchanged:
        sentences.append(
            f"the adapter changes nothing in {len(unchanged)} of {len(merged)} tensors ({unchanged[0]} is the first): "
            "factors that are all zero were never trained"
        )
    figures = _combined_figures(list(entries.values()))
    retention = figures.get("retention")
    if retention is not None and abs(retention - 1) > 1 - RETENTION_THRESHOLD:
        only = "only " if retention < 1 else ""
        sentences.append(
            f"{dtype} retains {only}{retention:.0%} of the adapter, with an error of "
            f"{_number(figures['error'], '.1f')} times its size, because many deltas are smaller than a rounding step; "
            "use `dtype` float32 or float16, or `rounding='stochastic'`, which retains all of it on average"
        )
    return sentences


@dataclass(frozen=True, slots=True)
class KindFigures:
    """The changed tensors of one kind of module, such as ``self_attn.q_proj``, as if they were one tensor.

    ``ranks`` are the ranks that occur, ascending; the figures are those of :class:`TensorEntry`.
    """

    kind: str
    tensors: int
    ranks: tuple[int, ...]
    delta_ratio: float | None
    retention: float | None
    error: float | None
    changed: float | None


def figures_by_kind(entries: Ledger) -> list[KindFigures]:
    """The figures of every kind of module with changed tensors, and of all together if there are several kinds."""
    kinds: dict[str, list[TensorEntry]] = {}
    for name, entry in entries.items():
        if entry.rms_delta is not None:
            kind = ".".join(name.split(".")[-2:]).removesuffix(".weight")
            kinds.setdefault(kind, []).append(entry)
    rows = sorted(kinds.items())
    if len(kinds) > 1:
        rows.append(("all", [entry for of_kind in kinds.values() for entry in of_kind]))
    return [_kind_figures(kind, of_kind) for kind, of_kind in rows]


def _kind_figures(kind: str, entries: Sequence[TensorEntry]) -> KindFigures:
    figures = _combined_figures(entries)
    return KindFigures(
        kind=kind,
        tensors=len(entries),
        ranks=tuple(sorted({entry.rank for entry in entries if entry.rank is not None})),
        delta_ratio=figures["delta_ratio"],
        retention=figures["retention"],
        error=figures["error"],
        changed=figures["changed"],
    )


def _combined_figures(entries: Sequence[TensorEntry]) -> dict[str, float | None]:
    """The figures of all changed tensors as if they were one; empty if none is changed."""
    stats = DeltaStats()
    for entry in entries:
        if entry.rms_delta is not None and entry.rms_weight is not None and entry.changed is not None:
            delta_square = entry.rms_delta**2 * entry.elements
            stats += DeltaStats(
                entry.elements,
                entry.rms_weight**2 * entry.elements,
                delta_square,
                (entry.retention or 0.0) * delta_square,
                (entry.error or 0.0) ** 2 * delta_square,
                round(entry.changed * entry.elements),
            )
    return stats.figures() if stats.elements else {}


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
