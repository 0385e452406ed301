"""Turn a merged directory, or a base and its adapters, into what runs: an ONNX graph or a bitsandbytes checkpoint."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pos2d.errors import UsageError
from pos2d.exporter.artifact.closing_check import closing_check
from pos2d.exporter.artifact.sidecars import copy_companions
from pos2d.exporter.artifact.staging import check_output, file_facts, staged
from pos2d.exporter.formats.bnb import QuantPlan, plan_bnb, write_bnb
from pos2d.exporter.formats.onnx.format import OnnxPlan, plan_onnx, write_onnx
from pos2d.exporter.formats.wanted import Wanted
from pos2d.exporter.merging.ledger import RETENTION_THRESHOLD
from pos2d.exporter.merging.preflight import COMPANION_BYTES, check_disk, disk_free
from pos2d.exporter.quantisation.totals import QuantTotals
from pos2d.exporter.sources.source import Source, TrainedPositions, from_adapters, from_merged
from pos2d.manifest import Manifest
from pos2d.spec import Align


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote; ``bytes`` is the size of the whole directory.

    ``parity``: the figures of the closing check of an ONNX graph, or nothing where it was skipped. ``quantised``: what
    quantising did to the weights, where they were; ``bits``: how many layers of a graph have 4 and 8 bits;
    ``weights_bytes``: what its file of weights takes.
    """

    output: str
    format: str
    quant: str | None
    bytes: int
    seconds: float
    parity: Mapping[str, Any] | None
    quantised: QuantTotals | None
    bits: Mapping[int, int] | None
    weights_bytes: int | None
    warnings: tuple[str, ...]

    def summary(self) -> str:
        """A line for people."""
        what = " ".join(filter(None, (self.format, self.quant)))
        figures = []
        if self.quant == "auto" and self.bits is not None and self.weights_bytes is not None:
            size = f"weights of {self.weights_bytes / 1e6:.1f} MB"
            figures.append(f"8 bits for {self.bits[8]} of {sum(self.bits.values())} layers, {size}")
        if self.quantised is not None:
            totals = self.quantised
            kept = "" if totals.retention is None else f", {totals.retention:.1%} of the adapter kept"
            figures.append(f"{totals.quantised} of {totals.tensors} tensors quantised, noise {totals.noise:.2%}{kept}")
        if self.parity is not None:
            than = "the merged model" if self.quantised is None else "float activations"
            figures.append(
                f"logits within {self.parity['max_abs_diff']:.1e} of {than}, "
                f"top token agrees on {self.parity['top1_agreement']:.1%}"
            )
        elif self.format == "onnx":
            figures.append("not verified")
        return f"{self.output}: {what}, {self.bytes / 1e6:.1f} MB in {self.seconds:.1f} s; {'; '.join(figures)}"


def export(
    merged: str | Path | None,
    output: str | Path,
    *,
    format: str = "onnx",
    quant: str | None = None,
    block_size: int | None = None,
    skip_modules: str | None = None,
    float_activations: str = "",
    target_size: str | None = None,
    base_model: str | Path | None = None,
    revision: str | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    rope_2d_ratio: float | None = None,
    pair_indices: str | Sequence[int] | None = None,
    no_patch_rope: bool = False,
    branch_stride: int = 128,
    align_to: Align = "left",
    lora_rank: int | None = None,
    dtype: str = "auto",
    max_shard_size: str | None = None,
    no_verify: bool = False,
    no_calibration: bool = False,
    force: bool = False,
) -> ExportReport:
    """Write ``output`` from a merged directory, or from ``base_model`` and ``lora``: then the exact sum is quantised.

    What the formats are, and which flags each has, stands in :class:`pos2d.exporter.formats.wanted.Wanted`; the others
    are
    those of :func:`pos2d.merge`. Graphs are checked from the written files alone, by the ``verify`` command in a
    process of its own, before they take their place; ``no_verify`` skips that.

    Raises:
        UsageError: flags that contradict each other, a format or a module that does not exist.
        InputError, UnsafeInputError: not a merged directory, or see :func:`pos2d.merge`.
        ParityError: the written graphs do not pass their check; nothing is kept.
        OutputError, StorageError: see :func:`pos2d.exporter.artifact.staging.staged`.
    """
    started = time.monotonic()
    output = Path(output)
    positions = TrainedPositions(rope_2d_ratio, pair_indices, no_patch_rope, branch_stride, align_to)
    what = (format, quant, block_size, skip_modules, float_activations, target_size, dtype, max_shard_size)
    wanted = Wanted(*what, no_verify, no_calibration)
    if (merged is None) == (base_model is None):
        raise UsageError("give either a MERGED directory or --base-model with --lora")
    check_output(output, force=force)
    source = _source(merged, base_model, lora, positions, revision, lora_rank)
    plan = plan_onnx(source, wanted) if format == "onnx" else plan_bnb(source, wanted)
    check_disk(output, plan.nbytes + COMPANION_BYTES, disk_free(output))
    with staged(output, force=force) as staging:
        copy_companions(source.base.directory, staging)
        if isinstance(plan, OnnxPlan):
            manifest = _export_onnx(source, plan, staging, no_verify)
        else:
            manifest = _export_bnb(source, plan, staging)
    return _report(output, format, manifest, source, time.monotonic() - started)


def _source(
    merged: str | Path | None,
    base_model: str | Path | None,
    lora: str | Path | Sequence[str | Path],
    positions: TrainedPositions,
    revision: str | None,
    lora_rank: int | None,
) -> Source:
    if merged is None:
        return from_adapters(str(base_model), lora, positions, revision=revision, lora_rank=lora_rank)
    if lora or revision is not None or lora_rank is not None or positions != TrainedPositions():
        raise UsageError("adapters, --revision and positions belong to --base-model; a MERGED directory has them")
    return from_merged(Path(merged))


def _report(output: Path, format: str, manifest: Manifest, source: Source, seconds: float) -> ExportReport:
    quantised = QuantTotals(**manifest.ledger["totals"]) if manifest.ledger is not None else None
    graph = manifest.graph_quant
    recipe = manifest.quant or graph
    return ExportReport(
        output=str(output),
        format=format,
        quant=None if recipe is None else recipe.name,
        bytes=manifest.total_bytes,
        seconds=seconds,
        parity=manifest.parity,
        quantised=quantised,
        bits=None if graph is None else {bits: list(graph.bits.values()).count(bits) for bits in (4, 8)},
        weights_bytes=None if manifest.graph is None else manifest.files[manifest.graph["data"]]["bytes"],
        warnings=(*source.warnings, *(() if quantised is None else _lost_before(source))),
    )


def _export_onnx(source: Source, plan: OnnxPlan, staging: Path, no_verify: bool) -> Manifest:
    graph, totals = write_onnx(source, plan, staging)
    manifest = _manifest(
        source,
        staging,
        kind="onnx",
        dtype=plan.dtype,
        options=source.options,
        graph=graph,
        graph_quant=plan.recipe,
        ledger=None if plan.recipe is None else {"totals": asdict(totals)},
    )
    manifest.write(staging)
    # What is made straight from adapters has no merged directory to be held against.
    exact = plan.recipe is None and not source.adapters
    if not no_verify and (exact or plan.recipe is not None):
        manifest = replace(manifest, parity=closing_check(staging, source.base.directory if exact else None))
        manifest.write(staging)
    return manifest


def _export_bnb(source: Source, plan: QuantPlan, staging: Path) -> Manifest:
    totals = {"totals": asdict(write_bnb(source, plan, staging))}
    manifest = _manifest(
        source, staging, kind="bnb", dtype=plan.dtype, options=source.options, quant=plan.recipe, ledger=totals
    )
    manifest.write(staging)
    return manifest


def _manifest(source: Source, staging: Path, **facts: Any) -> Manifest:
    sizes = source.base.sizes
    return Manifest(
        family=sizes.family,
        vocab_size=sizes.vocab,
        context_length=sizes.context_length,
        eos_token_ids=source.eos_token_ids,
        files=file_facts(staging),
        **{**source.origin, "rope_2d": source.spec, **facts},
    )


def _lost_before(source: Source) -> Iterator[str]:
    """What of an adapter was lost before the weights came here."""
    retention = source.retention
    if retention is not None and abs(retention - 1) > 1 - RETENTION_THRESHOLD:
        yield (
            f"{source.base.directory} holds {retention:.0%} of its adapter, as its type rounded it, and only that was "
            "quantised; --base-model with --lora quantises the exact sum"
        )
