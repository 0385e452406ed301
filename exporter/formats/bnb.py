"""A bitsandbytes checkpoint, written from the exact sum of base and adapters, shard by shard and without a GPU."""

from pathlib import Path
from typing import Any, get_args

from pos2d.bnb_format import BnbQuant
from pos2d.errors import UsageError
from pos2d.exporter.formats.checkpoint import CheckpointPlan, plan_checkpoint, write_checkpoint
from pos2d.exporter.formats.options import ExportOptions
from pos2d.sources.hf_config import artifact_config
from pos2d.sources.sidecars.sidecars import copy_code
from pos2d.sources.source import Source

OPTIONS = ("quant", "skip_modules", "dtype", "max_shard_size")


def refuse(options: ExportOptions) -> None:
    """Check that ``quant`` is one of bitsandbytes' formats.

    Raises:
        UsageError: it is not.
    """
    if options.quant not in get_args(BnbQuant):
        other = "" if options.quant == "none" else f"; `quant={options.quant!r}` needs `format='onnx'`"
        raise UsageError(f"`format='bnb'` needs `quant` {' or '.join(get_args(BnbQuant))}{other}")


def plan(source: Source, options: ExportOptions) -> CheckpointPlan:
    """Lay out the shards; see :func:`pos2d.exporter.formats.checkpoint.plan_checkpoint`."""
    return plan_checkpoint(source, options)


def write(source: Source, plan: CheckpointPlan, target: Path) -> dict[str, Any]:
    """Write weights, index, configuration and code into ``target``; returns the manifest's fields for them.

    Raises:
        InputError: values that are not finite, or a base that changed while it was read.
    """
    facts = write_checkpoint(source, plan, artifact_config(source.base, source.spec, plan.dtype, plan.tied), target)
    if source.spec.is_2d:
        copy_code(target)
    return facts


def check(staging: Path, source: Source, plan: CheckpointPlan) -> None:
    """No check: the logits of a quantised checkpoint are meant to differ, and ``pos2d eval`` measures by how much."""
