"""What every format of a model needs."""

from typing import Any

import click

from pos2d.commands.shared.options import json_option
from pos2d.commands.shared.report import show


@click.command()
@click.argument("model", metavar="MODEL_OR_ARTIFACT")
@click.option("--gpu-memory", metavar="8GB", help="Of the card to run on.  [default: the CPU, in the free memory]")
@click.option("--branches", type=int, default=1, show_default=True, help="Prompts that are answered side by side.")
@click.option("--context", type=int, default=4096, show_default=True, help="Positions in the cache, of all branches.")
@json_option
def plan(as_json: bool, **flags: Any) -> None:
    """Say what every format of a base or an artifact needs, and which one to take; no weight is read."""
    from pos2d import exporter

    report = exporter.plan(**flags)
    show(report, as_json, "\n".join(report.lines()))
