"""A checkpoint of the base's own classes, which loads without code of its own; of a model with 2D RoPE, one branch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pos2d.bnb_format import BnbQuant
from pos2d.errors import UsageError
from pos2d.exporter.artifact.closing_check import closing_check
from pos2d.exporter.formats.checkpoint import CheckpointPlan, plan_checkpoint, write_checkpoint
from pos2d.exporter.formats.options import ExportOptions
from pos2d.sources.hf_config import stock_config
from pos2d.sources.source import Source

OPTIONS = ("quant", "skip_modules", "dtype", "max_shard_size", "no_verify")


def refuse(options: ExportOptions) -> None:
    """Check that ``quant`` is none or one of bitsandbytes' formats, and that there are layers to skip.

    Raises:
        UsageError: it is another, or ``skip_modules`` is given without it.
    """
    known = ("none", *get_args(BnbQuant))
    if options.quant not in known:
        raise UsageError(
            f"`format='stock'` takes `quant` {', '.join(known)}; `quant={options.quant!r}` needs `format='onnx'`"
        )
    if options.quant == "none" and options.skip_modules is not None:
        raise UsageError("`skip_modules` names layers that are not quantised; give `quant` as well, or leave it out")


def plan(source: Source, options: ExportOptions) -> CheckpointPlan:
    """Lay out the shards; see :func:`pos2d.exporter.formats.checkpoint.plan_checkpoint`."""
    return plan_checkpoint(source, options)


def write(source: Source, plan: CheckpointPlan, target: Path) -> dict[str, Any]:
    """Write weights, index and configuration into ``target``; returns the manifest's fields for them.

    Raises:
        InputError: values that are not finite, or a base that changed while it was read.
    """
    config = stock_config(source.base, source.spec, plan.dtype, plan.tied)
    return {**write_checkpoint(source, plan, config, target), **source.one_branch_facts}


def check(staging: Path, source: Source, plan: CheckpointPlan) -> Mapping[str, Any] | None:
    """Compare the logits with those of the model that the weights come from.

    That is left out where they are meant to differ, because weights are quantised or rounded to a narrower type, and
    where the weights come from a base and adapters.

    Raises:
        ParityError: they differ by more than they may.
    """
    if plan.recipe is not None or source.reference is None or not plan.keeps_values:
        return None
    return closing_check(staging, source.reference)
