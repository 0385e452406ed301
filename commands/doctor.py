"""What this machine has, and what is missing."""

import click

from pos2d.commands.shared.options import json_option
from pos2d.commands.shared.report import show


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine has, and what the tool still needs."""
    from pos2d import runtime

    report = runtime.doctor()
    show(report, as_json, "\n".join(report.lines()))
    report.raise_if_unfit()
