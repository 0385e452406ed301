"""Merge adapters into their base and bake the positions: base + LoRA -> a Hugging Face directory."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pos2d.dtypes import check_dtype
from pos2d.errors import UsageError
from pos2d.exporter.artifact.hf_config import baked_config
from pos2d.exporter.artifact.sidecars import copy_code, copy_companions
from pos2d.exporter.artifact.staging import JOURNAL, check_output, file_facts, staged, write_json
from pos2d.exporter.inputs.checkpoint import INDEX, Checkpoint
from pos2d.exporter.merging.journal import Journal
from pos2d.exporter.merging.ledger import Ledger, Totals, read_ledger, table, total, warnings
from pos2d.exporter.merging.preflight import Needs, needs_of
from pos2d.exporter.merging.resume import finished_artifact
from pos2d.exporter.merging.writer import write_weights
from pos2d.exporter.sources.source import Source, TrainedPositions, from_adapters
from pos2d.exporter.tensors.plan import MergePlan, plan_merge
from pos2d.exporter.tensors.rounding import ROUNDINGS, Rounding
from pos2d.manifest import Manifest
from pos2d.spec import Align, spans


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge wrote, or with ``dry_run`` would write; ``bytes`` is the size of the whole directory.

    ``ledger`` maps tensor names to what was done to them; it and ``totals`` are absent after a dry run.
    """

    output: str
    dry_run: bool
    family: str
    dtype: str
    rope_2d: Mapping[str, Any]
    untied: bool
    base: Mapping[str, Any]
    adapters: tuple[Mapping[str, Any], ...]
    needs: Needs
    bytes: int
    seconds: float
    warnings: tuple[str, ...]
    totals: Totals | None
    ledger: Ledger | None

    def lines(self) -> list[str]:
        """A summary for people."""
        rope = self.rope_2d
        turning = f"frequencies {spans(rope['pair_indices'])} of {len(rope['axes'])} turn with branch and time"
        layout = f"stride {rope['branch_stride']}, align {rope['align_to']}, {rope['visibility']}"
        positions = [f"positions: {turning if rope['pair_indices'] else 'no 2D RoPE'}; {layout}"]
        if self.untied:
            positions.append("the adapter changes head and embedding differently: they are two tensors now")
        if self.totals is None or self.ledger is None:
            disk, memory = (f"{size / 1e9:.2f} GB" for size in (self.needs.disk, self.needs.memory))
            free, available = (f"{size / 1e9:.2f}" for size in (self.needs.disk_free, self.needs.memory_available))
            needs = f"{disk} of disk ({free} free) and {memory} of memory ({available} available)"
            return [*positions, f"{self.output}: needs {needs}"]
        changed = self.totals.merged + self.totals.replaced
        summary = f"{changed} of {self.totals.tensors} tensors changed ({self.dtype}), {self.bytes / 1e6:.1f} MB"
        return [*table(self.ledger), *positions, f"{self.output}: {summary} in {self.seconds:.1f} s"]


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A merge that was checked; ``recipe`` is what its manifest says of how it is made: equal ones make equal bytes."""

    source: Source
    plan: MergePlan
    rounding: Rounding
    recipe: dict[str, Any]


def merge(
    base_model: str | Path,
    lora: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    revision: str | None = None,
    rope_2d_ratio: float | None = None,
    pair_indices: str | Sequence[int] | None = None,
    no_patch_rope: bool = False,
    branch_stride: int = 128,
    align_to: Align = "left",
    lora_rank: int | None = None,
    dtype: str = "auto",
    rounding: str = "nearest",
    seed: int = 0,
    max_shard_size: str | None = None,
    dry_run: bool = False,
    resume: bool = False,
    force: bool = False,
) -> MergeReport:
    """Write ``output``: the base with the sum of ``lora``'s changes in every adapted weight, and its positions baked.

    ``lora`` is one adapter or several, each a path or ``PATH=WEIGHT``. The sum is taken in float64 and rounded once, to
    ``dtype`` (``auto``: each tensor keeps the base's), to the nearest value or stochastically from ``seed``. Tensors
    that nothing changes are copied as bytes. ``rope_2d_ratio`` (0.5 when nothing is said), ``pair_indices`` and
    ``no_patch_rope`` exclude one another.

    ``resume`` goes on with what an interrupted merge of the same inputs has finished, to the same bytes; ``force``
    replaces an artifact that is there. ``dry_run`` checks everything and writes nothing.

    Raises:
        UsageError: flags that contradict each other.
        InputError: see :func:`pos2d.exporter.inputs.base.read_base` and :func:`pos2d.exporter.adapters.read_adapters`;
        values that are
            not finite.
        UnsafeInputError: an adapter or base that would run code, an index that leaves its directory.
        OutputError, StorageError: see :func:`pos2d.exporter.artifact.staging.staged`; a disk or a memory that is too
        small.
    """
    started = time.monotonic()
    output = Path(output)
    _check_flags(dtype, rounding)
    positions = TrainedPositions(rope_2d_ratio, pair_indices, no_patch_rope, branch_stride, align_to)
    check_output(output, force=force or resume)
    source = from_adapters(base_model, lora, positions, revision=revision, lora_rank=lora_rank)
    plan = plan_merge(source.base, source.adapters, dtype, max_shard_size)
    rounded = Rounding(rounding, seed)
    options = {"dtype": dtype, "max_shard_size": max_shard_size, "rounding": rounded.to_dict()}
    task = Task(source, plan, rounded, source.origin | {"options": options})
    needs = needs_of(plan, source.adapters, output)

    manifest = finished_artifact(output, task.recipe, source.base, plan) if resume and not dry_run else None
    if manifest is None:
        check_output(output, force=force)
        needs.check(output)
        manifest = None if dry_run else _carry_out(task, output, force, resume)
    return _report(task, output, needs, manifest, time.monotonic() - started)


def _carry_out(task: Task, output: Path, force: bool, resume: bool) -> Manifest:
    with staged(output, force=force, resume=resume) as staging:
        journal = Journal(staging.parent / JOURNAL, task.recipe | {"base_files": _stamps(task.source.base)})
        ledger = write_weights(task.plan, task.source.base.directory, task.rounding, journal, staging)
        return _write_rest(task, ledger, staging)


def _write_rest(task: Task, ledger: Ledger, staging: Path) -> Manifest:
    """Everything beside the weights, the manifest last."""
    base, plan = task.source.base, task.plan
    index = plan.index()
    if index is not None:
        write_json(staging / INDEX, index)
    write_json(staging / "config.json", baked_config(base, task.source.spec, plan.dtype, plan.tied))
    copy_code(staging)
    copy_companions(base.directory, staging)
    manifest = Manifest(
        kind="merged",
        family=base.sizes.family,
        dtype=plan.dtype,
        vocab_size=base.sizes.vocab,
        context_length=base.sizes.context_length,
        eos_token_ids=task.source.eos_token_ids,
        files=file_facts(staging, without={shard.file for shard in plan.shards}),
        ledger={
            "totals": asdict(total(ledger.values())),
            "tensors": {name: entry.to_dict() for name, entry in ledger.items()},
        },
        **{**task.recipe, "rope_2d": task.source.spec},
    )
    manifest.write(staging)
    return manifest


def _report(task: Task, output: Path, needs: Needs, manifest: Manifest | None, seconds: float) -> MergeReport:
    ledger = read_ledger(manifest) if manifest is not None else None
    return MergeReport(
        output=str(output),
        dry_run=manifest is None,
        family=task.source.base.sizes.family,
        dtype=task.plan.dtype,
        rope_2d=task.recipe["rope_2d"],
        untied=task.source.base.sizes.tied and not task.plan.tied,
        base=task.recipe["base"],
        adapters=task.recipe["adapters"],
        needs=needs,
        bytes=task.plan.nbytes if manifest is None else manifest.total_bytes,
        seconds=seconds,
        warnings=(*task.source.warnings, *warnings(ledger or {}, task.plan.dtype)),
        totals=total(ledger.values()) if ledger is not None else None,
        ledger=ledger,
    )


def _stamps(base: Checkpoint) -> dict[str, list[int]]:
    """Size and time of the base's files, by which a resumed merge knows that they are still the same."""
    stats = {file: (base.directory / file).stat() for file in base.files}
    return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


def _check_flags(dtype: str, rounding: str) -> None:
    check_dtype(dtype)
    if rounding not in ROUNDINGS:
        raise UsageError(f"rounding {rounding!r} is not one of {', '.join(ROUNDINGS)}")
