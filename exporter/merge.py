"""Merge adapters into their base and bake the positions: base + LoRA -> a Hugging Face directory."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pos2d.dtypes import ComputeDtype
from pos2d.errors import UsageError
from pos2d.exporter.artifact.card import with_card
from pos2d.exporter.artifact.staging import JOURNAL, check_output, file_facts, staged
from pos2d.exporter.merging.journal import Journal
from pos2d.exporter.merging.ledger import Ledger, Totals, read_ledger, total, warnings
from pos2d.exporter.merging.preflight import Needs, needs_of
from pos2d.exporter.merging.resume import finished_artifact
from pos2d.exporter.merging.shard_writer import write_weights
from pos2d.exporter.merging.shards import ShardLayout, lay_out_shards
from pos2d.manifest import Manifest
from pos2d.options import check_options, option, read_options, takes_options
from pos2d.sources.base_options import BaseOptions
from pos2d.sources.checkpoints.weight_files import CONFIG, INDEX
from pos2d.sources.files.json_object import write_json
from pos2d.sources.files.parallel import limited_threads
from pos2d.sources.hf_config import artifact_config
from pos2d.sources.positions import TrainedPositions
from pos2d.sources.sidecars.sidecars import copy_code, write_sidecars
from pos2d.sources.source import Source, read_source
from pos2d.sources.tensors.rounding import Rounding, RoundingMode
from pos2d.sources.tensors.tensor_plan import TensorPlan, plan_tensors
from pos2d.threads import ThreadOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """How the sum of base and adapters is stored."""

    dtype: Literal["auto", ComputeDtype] = option(
        "auto", "Type of the stored weights; auto keeps the type of each weight."
    )
    rounding: RoundingMode = option(
        "nearest",
        "How weights are rounded to the stored type; stochastic retains small changes on average, where nearest loses "
        "them.",
    )
    seed: int = option(0, "Random seed for stochastic rounding.")
    max_shard_size: str | None = option(
        None,
        "Largest size of one weight file, such as 5GB.",
        metavar="SIZE",
        default_text="the files of the base model",
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge wrote, or with ``dry_run`` would write; ``bytes`` is the size of the whole directory.

    ``was_finished``: a resumed merge found its output complete, and wrote nothing. ``tokenizer``: whose tokenizer
    travels, ``base`` or the name of an adapter or directory. ``ledger`` maps tensor names to what was done to them; it
    and ``totals`` are None after a dry run. ``notes``: what was decided by default.
    """

    output: str
    dry_run: bool
    was_finished: bool
    family: str
    dtype: str
    rope_2d: Mapping[str, Any]
    untied: bool
    tokenizer: str
    base: Mapping[str, Any]
    adapters: tuple[Mapping[str, Any], ...]
    needs: Needs
    bytes: int
    seconds: float
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    totals: Totals | None
    ledger: Ledger | None


@dataclass(frozen=True, slots=True, eq=False)
class CheckedMerge:
    """A merge whose inputs are read and checked.

    ``recipe`` is the part of the manifest that says how it is made; merges with equal recipes have equal bytes.
    """

    source: Source
    plan: TensorPlan
    layout: ShardLayout
    rounding: Rounding
    recipe: dict[str, Any]


@takes_options(BaseOptions, TrainedPositions, MergeOptions, ThreadOptions)
def merge(
    base_model: str | Path,
    lora: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    dry_run: bool = False,
    resume: bool = False,
    force: bool = False,
    **options: Any,
) -> MergeReport:
    """Write ``output``: the base with all adapters added and its positions baked.

    The sum of base and adapters is computed in float64 and rounded once; tensors that no adapter changes are copied
    byte for byte.

    Args:
        base_model: a Hugging Face model directory, or a Hub id.
        lora: one adapter or several, each a path or ``PATH=WEIGHT``, or an id on the Hub as ``ORG/NAME@REVISION``.
            Several are summed, each as trained on the base.
        output: the directory to write.
        dry_run: check everything and write nothing.
        resume: continue an interrupted merge of the same inputs, to the same bytes.
        force: replace an artifact at ``output``.
        options: fields of the groups ``BaseOptions``, ``TrainedPositions``, :class:`MergeOptions`, ``ThreadOptions``.

    Raises:
        UsageError: options out of range, or that contradict each other.
        InputError: see :func:`pos2d.sources.checkpoints.base.read_base` and
            :func:`pos2d.sources.adapters.read_adapters`; values that are not finite.
        UnsafeInputError: an adapter or base that would run code, or an index that names files outside its directory.
        OutputError, StorageError: see :func:`pos2d.exporter.artifact.staging.staged`; too little disk space or memory.
    """
    started = time.monotonic()
    output = Path(output)
    base, settings, positions, computing = read_options(
        options | {"base_model": base_model, "lora": lora},
        *(BaseOptions, MergeOptions, TrainedPositions, ThreadOptions),
    )
    if not base.lora:
        raise UsageError("give at least one `lora`; a model without an adapter needs no merge, and export takes it")
    check_output(output, force=force or resume)
    source = read_source(None, base, positions)
    job = _checked(source, settings)
    needs = needs_of(job.layout, source.adapters, output)

    manifest = _finished(job, output) if resume and not dry_run else None
    was_finished = manifest is not None
    if manifest is None:
        check_output(output, force=force)
        needs.check(output)
        with limited_threads(computing.threads):
            manifest = None if dry_run else _write(job, output, force, resume)
    return _report(job, output, needs, manifest, was_finished, time.monotonic() - started)


def _checked(source: Source, settings: MergeOptions) -> CheckedMerge:
    plan = plan_tensors(source.base, source.adapters, settings.dtype)
    layout = lay_out_shards(plan, source.base, settings.max_shard_size)
    rounding = Rounding(settings.rounding, settings.seed)
    recorded = {
        "dtype": settings.dtype,
        "max_shard_size": settings.max_shard_size,
        "rounding": rounding.to_dict(),
    }
    return CheckedMerge(source, plan, layout, rounding, source.origin | {"options": {**source.options, **recorded}})


def _finished(merge: CheckedMerge, output: Path) -> Manifest | None:
    """The manifest of ``output`` if it is what this merge would write."""
    with TemporaryDirectory() as directory:
        _write_small_files(merge, Path(directory))
        small_files = {name: facts["sha256"] for name, facts in file_facts(Path(directory)).items()}
    return finished_artifact(output, merge.recipe, merge.source.base, merge.layout, small_files)


def _write(merge: CheckedMerge, output: Path, force: bool, resume: bool) -> Manifest:
    with staged(output, force=force, resume=resume) as staging:
        journal = Journal(staging.parent / JOURNAL, merge.recipe | {"base_files": merge.source.base.stamps()})
        ledger = write_weights(merge.layout, merge.source.base.directory, merge.rounding, journal, staging)
        return _write_settings(merge, ledger, staging)


def _write_settings(merge: CheckedMerge, ledger: Ledger, staging: Path) -> Manifest:
    """Write everything but the weights, the manifest last."""
    _write_small_files(merge, staging)
    manifest = merge.source.manifest(
        kind=merge.source.kind,
        dtype=merge.plan.dtype,
        options=merge.recipe["options"],
        files=file_facts(staging, without={shard.file for shard in merge.layout.shards}),
        ledger={
            "totals": asdict(total(ledger.values())),
            "tensors": {name: entry.to_dict() for name, entry in ledger.items()},
        },
    )
    manifest = with_card(staging, manifest, merge.source)
    manifest.write(staging)
    return manifest


def _write_small_files(merge: CheckedMerge, target: Path) -> None:
    """Write everything but weights, manifest and card."""
    base, plan = merge.source.base, merge.plan
    index = merge.layout.index()
    if index is not None:
        write_json(target / INDEX, index)
    write_json(target / CONFIG, artifact_config(base, merge.source.spec, plan.dtype, plan.tied))
    if merge.source.spec.is_2d:
        copy_code(target)
    write_sidecars(merge.source.sidecars, target, base.sizes.family)


def _report(
    merge: CheckedMerge, output: Path, needs: Needs, manifest: Manifest | None, was_finished: bool, seconds: float
) -> MergeReport:
    ledger = read_ledger(manifest) if manifest is not None else None
    return MergeReport(
        output=str(output),
        dry_run=manifest is None,
        was_finished=was_finished,
        family=merge.source.base.sizes.family,
        dtype=merge.plan.dtype,
        rope_2d=merge.recipe["rope_2d"],
        untied=merge.source.base.sizes.tied and not merge.plan.tied,
        tokenizer=merge.source.sidecars.tokenizer_of,
        base=merge.recipe["base"],
        adapters=merge.recipe["adapters"],
        needs=needs,
        bytes=merge.layout.nbytes if manifest is None else manifest.total_bytes,
        seconds=seconds,
        warnings=(*merge.source.warnings, *warnings(ledger or {}, merge.plan.dtype)),
        notes=merge.source.notes,
        totals=total(ledger.values()) if ledger is not None else None,
        ledger=ledger,
    )
