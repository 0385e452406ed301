"""Turn a merged directory, or a base and its adapters, into what runs: an ONNX graph or a bitsandbytes checkpoint."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from exporter.companions import copy_companions
from exporter.formats.bnb import QuantPlan, QuantTotals, plan_bnb, write_bnb
from exporter.formats.onnx import write_onnx
from exporter.merging.ledger import RETENTION_THRESHOLD
from exporter.merging.preflight import COMPANION_BYTES, check_disk, disk_free
from exporter.sources import Source, TrainedPositions, from_adapters, from_merged
from exporter.staging import check_output, file_facts, staged
from pos2d.dtypes import check_dtype
from pos2d.errors import ParityError, Pos2DError, UsageError
from pos2d.manifest import Manifest
from pos2d.progress import Progress
from pos2d.recipe import Quant
from pos2d.spec import Align

FORMATS = ("onnx", "bnb")
SKIPPED = "lm_head"


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote; ``bytes`` is the size of the whole directory.

    ``parity``: the figures of the closing check of an ONNX graph, or nothing where it was skipped. ``quantised``: what
    quantising did to the weights, where they were.
    """

    output: str
    format: str
    quant: str | None
    bytes: int
    seconds: float
    parity: Mapping[str, Any] | None
    quantised: QuantTotals | None
    warnings: tuple[str, ...]

    def summary(self) -> str:
        """A line for people."""
        what = " ".join(filter(None, (self.format, self.quant)))
        figures = "not verified"
        if self.parity is not None:
            figures = (
                f"logits within {self.parity['max_abs_diff']:.1e} of the merged model, "
                f"top token agrees on {self.parity['top1_agreement']:.1%}"
            )
        if self.quantised is not None:
            totals = self.quantised
            kept = "" if totals.retention is None else f", {totals.retention:.1%} of the adapter kept"
            figures = f"{totals.quantised} of {totals.tensors} tensors quantised, noise {totals.noise:.2%}{kept}"
        return f"{self.output}: {what}, {self.bytes / 1e6:.1f} MB in {self.seconds:.1f} s; {figures}"


def export(
    merged: str | Path | None,
    output: str | Path,
    *,
    format: str = "onnx",
    quant: Quant | None = None,
    skip_modules: str = SKIPPED,
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
    force: bool = False,
) -> ExportReport:
    """Write ``output`` from a merged directory, or (``bnb``) from ``base_model`` and ``lora``.

    ``onnx`` is a float32 decoder with its KV cache. It is held against ``merged`` by the ``verify`` command, in a
    process of its own and from the written files alone, before it takes its place; ``no_verify`` skips that.

    ``bnb`` is a bitsandbytes checkpoint, ``quant`` ``8bit`` or ``nf4``, written tensor by tensor. Every value is
    quantised from what the source holds: from ``base_model`` and ``lora`` that is the exact sum, from ``merged`` the
    sum as it was rounded. ``skip_modules`` names the linear layers that stay as they are, ``dtype`` the type of all
    that is not quantised (``auto``: each tensor keeps its own).

    The other flags are those of :func:`exporter.merge`.

    Raises:
        UsageError: flags that contradict each other, a format or a module that does not exist.
        InputError: ``merged`` is not a merged directory, or its weights do not fit its configuration; for the other
            sources, and for UnsafeInputError, see :func:`exporter.merge`.
        ParityError: the written graph does not agree with ``merged``; nothing is kept.
        OutputError, StorageError: see :func:`exporter.staging.staged`.
    """
    started = time.monotonic()
    output = Path(output)
    positions = TrainedPositions(rope_2d_ratio, pair_indices, no_patch_rope, branch_stride, align_to)
    _check_flags(format, quant, dtype, merged, base_model)
    _check_format_flags(format, skip_modules, max_shard_size, dtype, no_verify)
    check_output(output, force=force)
    source = _source(merged, base_model, lora, positions, revision, lora_rank)
    plan = None if quant is None else plan_bnb(source, quant, skip_modules, dtype, max_shard_size)
    if plan is not None:
        check_disk(output, plan.nbytes + COMPANION_BYTES, disk_free(output))
    with staged(output, force=force) as staging:
        copy_companions(source.base.directory, staging)
        manifest = _export_onnx(source, staging, no_verify) if plan is None else _export_bnb(source, plan, staging)
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
    return ExportReport(
        output=str(output),
        format=format,
        quant=manifest.quant.name if manifest.quant is not None else None,
        bytes=manifest.total_bytes,
        seconds=seconds,
        parity=manifest.parity,
        quantised=quantised,
        warnings=() if quantised is None else tuple(_warnings(source)),
    )


def _check_flags(format: str, quant: str | None, dtype: str, merged: object, base_model: object) -> None:
    if format not in FORMATS:
        raise UsageError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    check_dtype(dtype)
    if format == "bnb" and quant not in get_args(Quant):
        raise UsageError(f"--format bnb needs --quant {' or '.join(get_args(Quant))}")
    if format == "onnx" and quant is not None:
        raise UsageError("--quant belongs to --format bnb; onnx is float32")
    if (merged is None) == (base_model is None):
        raise UsageError("give either a MERGED directory or --base-model with --lora")
    if format == "onnx" and merged is None:
        raise UsageError("--format onnx starts from a MERGED directory; make one with merge")


def _check_format_flags(
    format: str, skip_modules: str, max_shard_size: str | None, dtype: str, no_verify: bool
) -> None:
    """Refuse what the format would not heed."""
    if format == "onnx" and (skip_modules != SKIPPED or max_shard_size is not None or dtype != "auto"):
        raise UsageError("--skip-modules, --max-shard-size and --dtype belong to --format bnb; onnx is float32")
    if format == "bnb" and no_verify:
        raise UsageError("--no-verify belongs to --format onnx; eval measures a quantised artifact")


def _export_onnx(source: Source, staging: Path, no_verify: bool) -> Manifest:
    graph = write_onnx(source, staging)
    manifest = _manifest(source, staging, kind="onnx", dtype="float32", options=source.options, graph=graph)
    manifest.write(staging)
    if not no_verify:
        manifest = replace(manifest, parity=_verify(staging, source.base.directory))
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


def _warnings(source: Source) -> Iterator[str]:
    """What was taken unsaid, and what was lost before the weights came here."""
    yield from source.warnings
    retention = source.retention
    if retention is not None and abs(retention - 1) > 1 - RETENTION_THRESHOLD:
        yield (
            f"{source.base.directory} holds {retention:.0%} of its adapter, as its type rounded it, and only that was "
            "quantised; --base-model with --lora quantises the exact sum"
        )


def _verify(staging: Path, merged: Path) -> dict[str, Any]:
    """Run ``verify`` on the written files; exporter and runtime meet nowhere else than in the artifact."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "cli", "verify", str(staging), "--against", str(merged), "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with Progress("verifying", 1):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == ParityError.exit_code:
        raise ParityError(
            f"the exported graph does not agree with {merged}; nothing was kept. {_last_line(done.stderr)}"
        )
    if done.returncode != 0:
        raise Pos2DError(f"verify ended with exit code {done.returncode}: {_last_line(done.stderr)}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1].removeprefix("error: ") if text.strip() else "it said nothing"
