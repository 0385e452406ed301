"""Add adapters to their base model."""

from typing import Any

import click

from pos2d.commands.shared.options import (
    adapter_options,
    dtype_choice,
    force_option,
    json_option,
    output_option,
    shard_option,
)
from pos2d.commands.shared.report import show, warn


@click.command()
@adapter_options(required=True)
@output_option
@click.option(
    "--dtype",
    type=dtype_choice,
    default="auto",
    show_default=True,
    help="Type of the written weights; auto keeps the base's.",
)
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "stochastic"]),
    default="nearest",
    show_default=True,
    help="stochastic keeps small changes on average where a half would swallow them.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the stochastic rounding.")
@shard_option
@click.option("--dry-run", is_flag=True, help="Check everything, say what is needed, write nothing.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted merge of the same inputs.")
@force_option
@json_option
def merge(as_json: bool, **flags: Any) -> None:
    """Add adapters to their base model and bake the positions.

    Ratio, stride and alignment must be those of the training; the trainer does not save them. Without --max-shard-size
    the base's files are kept.
    """
    from pos2d import exporter

    report = exporter.merge(**flags)
    warn(report.warnings)
    show(report, as_json, "\n".join(report.lines()))
