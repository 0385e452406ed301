"""Turn a merge, a plain model, or a base and its adapters, into an artifact of another format."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pos2d.errors import UsageError
from pos2d.exporter.artifact.card import with_card
from pos2d.exporter.artifact.figures import parity_text
from pos2d.exporter.artifact.staging import check_output, file_facts, staged
from pos2d.exporter.formats import format_of, load_format
from pos2d.exporter.formats.options import ExportOptions, FormatName
from pos2d.exporter.merging.ledger import RETENTION_THRESHOLD
from pos2d.exporter.merging.preflight import SIDECAR_BYTES, check_disk, disk_free
from pos2d.exporter.quantisation.summary import QuantisationSummary
from pos2d.manifest import GRAPH_KINDS, Manifest
from pos2d.options import read_options, takes_options
from pos2d.recipes import ALL_BITS
from pos2d.sources.base_options import BaseOptions
from pos2d.sources.files.parallel import limited_threads
from pos2d.sources.positions import TrainedPositions
from pos2d.sources.sidecars.sidecars import write_sidecars
from pos2d.sources.source import Source, read_source
from pos2d.threads import ThreadOptions
from pos2d.units import size_text


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote; ``bytes`` is the size of the whole directory.

    ``parity``: the figures of the closing check, or nothing where there was none. ``quantised``: what quantising did to
    the weights. ``bits``: how many layers of a graph have 4 and 8 bits; ``weights_bytes``: the size of its weight file.
    ``notes``: what was decided by default.
    """

    output: str
    format: FormatName
    quant: str | None
    bytes: int
    seconds: float
    parity: Mapping[str, Any] | None
    quantised: QuantisationSummary | None
    bits: Mapping[int, int] | None
    weights_bytes: int | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def summary(self) -> str:
        """One line for people."""
        what = " ".join(filter(None, (self.format, self.quant)))
        figures = "; ".join(self._figures())
        return f"{self.output}: {what}, {size_text(self.bytes)} in {self.seconds:.1f} s; {figures}"

    def _figures(self) -> Iterator[str]:
        if self.quant == "auto" and self.bits is not None and self.weights_bytes is not None:
            size = f"weights of {size_text(self.weights_bytes)}"
            yield f"8 bits for {self.bits[8]} of {sum(self.bits.values())} layers, {size}"
        totals = self.quantised
        if totals is not None:
            # The error of calibrated weights says nothing of the model: it is larger where the model is better.
            noise = f", noise {totals.noise:.2%}" if self.format not in GRAPH_KINDS else ""
            yield f"{totals.quantised} of {totals.tensors} tensors quantised{noise}"
        if self.parity is not None:
            yield parity_text(self.parity)
        elif "no_verify" in load_format(self.format).OPTIONS and not (self.format == "stock" and self.quant):
            yield "not verified"


@takes_options(ExportOptions, BaseOptions, TrainedPositions, ThreadOptions)
def export(
    model: str | Path | None = None,
    output: str | Path | None = None,
    *,
    force: bool = False,
    **options: Any,
) -> ExportReport:
    """Write ``output`` from ``model``, or from ``base_model`` and ``lora``: then from their exact sum.

    ``model`` is a directory that :func:`pos2d.merge` wrote, or a plain model: a Hugging Face directory, or the id of
    one on the Hub as ``ORG/NAME@REVISION``. :class:`pos2d.exporter.formats.options.ExportOptions` has what is written;
    the other options are those of :func:`pos2d.merge`. Before the artifact takes its place, its format compares the
    written files with their source; ``no_verify`` skips that.

    Raises:
        UsageError: options that contradict each other, or that the format does not have.
        InputError, UnsafeInputError: another kind of artifact, or see :func:`pos2d.merge`.
        ParityError: the written files do not pass their check; they are deleted.
        OutputError, StorageError: see :func:`pos2d.exporter.artifact.staging.staged`.
    """
    started = time.monotonic()
    if output is None:
        raise UsageError("`output` is missing; give the directory to write")
    output = Path(output)
    positions, chosen, computing, base = read_options(
        options, TrainedPositions, ExportOptions, ThreadOptions, BaseOptions
    )
    form = format_of(chosen)
    check_output(output, force=force)
    source = read_source(model, base, positions)
    plan = form.plan(source, chosen)
    check_disk(output, plan.nbytes + SIDECAR_BYTES, disk_free(output))
    with staged(output, force=force) as staging, limited_threads(computing.threads):
        write_sidecars(source.sidecars, staging, source.base.sizes.family)
        facts = form.write(source, plan, staging)
        manifest = source.manifest(kind=chosen.format, files=file_facts(staging), **facts)
        manifest.write(staging)
        parity = None if chosen.no_verify else form.check(staging, source, plan)
        manifest = with_card(staging, replace(manifest, parity=parity), source)
        manifest.write(staging)
    return _report(output, chosen.format, manifest, source, plan.warnings, time.monotonic() - started)


def _report(
    output: Path,
    format: FormatName,
    manifest: Manifest,
    source: Source,
    warnings: tuple[str, ...],
    seconds: float,
) -> ExportReport:
    graph = manifest.graph_quant
    recipe = manifest.recipe
    totals = (manifest.ledger or {}).get("totals", {})
    quantised = QuantisationSummary(**totals) if totals and recipe is not None else None
    lost = _lost_in_merge(source) if quantised is not None else _lost_in_rounding(source, manifest.dtype, totals)
    return ExportReport(
        output=str(output),
        format=format,
        quant=None if recipe is None else recipe.name,
        bytes=manifest.total_bytes,
        seconds=seconds,
        parity=manifest.parity,
        quantised=quantised,
        bits=None if graph is None else {bits: list(graph.bits.values()).count(bits) for bits in ALL_BITS},
        weights_bytes=None if manifest.graph is None else manifest.files[manifest.graph.data]["bytes"],
        warnings=(*source.warnings, *warnings, *lost),
        notes=source.notes,
    )


def _lost_in_merge(source: Source) -> Iterator[str]:
    """A warning if rounding lost a part of the adapters when the source was merged, before it was quantised."""
    retention = source.retention
    if retention is not None and abs(retention - 1) > 1 - RETENTION_THRESHOLD:
        yield (
            f"{source.base.directory} holds {retention:.0%} of its adapter, as its type rounded it, and only that was "
            "quantised; `base_model` with `lora` quantises the exact sum"
        )


def _lost_in_rounding(source: Source, dtype: str, totals: Mapping[str, Any]) -> Iterator[str]:
    """A warning if rounding to a type of floating point lost a part of the adapters, or may have."""
    retention = totals.get("retention")
    if retention is not None and abs(retention - 1) > 1 - RETENTION_THRESHOLD:
        yield (
            f"{dtype} retains {retention:.0%} of the adapter, because many deltas are smaller than a rounding step; "
            "use `dtype` float32 or float16"
        )
    if totals and "retention" not in totals and source.origin["adapters"]:
        yield (
            f"{source.base.directory} was rounded further, to {dtype}, and how much of its adapter that retains is not "
            "known; `base_model` with `lora` measures it"
        )
