"""Explain an adapter, a base or an artifact."""

from typing import Any

import click

from pos2d.commands.shared.options import json_option, revision_option
from pos2d.commands.shared.report import show


@click.command()
@click.argument("path")
@click.option("--base-model", metavar="DIR_OR_HUB_ID", help="Say whether the adapter fits this base.")
@revision_option
@click.option("--guess-ratio", is_flag=True, help="Find the ratio and the stride of the training, by reading --text.")
@click.option("--text", metavar="FILE", help="A few dozen lines like the training data: JSONL, or paragraphs.")
@json_option
def inspect(as_json: bool, **flags: Any) -> None:
    """Explain an adapter, a base or an artifact."""
    from pos2d import exporter
    from pos2d.exporter.inspection.text import inspect_lines

    report = exporter.inspect(**flags)
    show(report, as_json, "\n".join(inspect_lines(report)))
    report.raise_if_misfit()
