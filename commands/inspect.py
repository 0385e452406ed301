"""Explain an adapter, a base model or an artifact."""

from typing import Any

import click

from pos2d.commands.shared.flags import flag_of, flags_of, json_flag
from pos2d.commands.shared.help import SectionedCommand
from pos2d.commands.shared.report import show
from pos2d.options import options_of
from pos2d.sources.base_options import BaseOptions
from pos2d.threads import ThreadOptions


@click.command(cls=SectionedCommand)
@click.argument("path")
@click.option("--base-model", metavar="DIR_OR_HUB_ID", help="Base model; the report says whether the adapter fits it.")
@flag_of(options_of(BaseOptions)["revision"], "Options")
@click.option(
    "--guess-ratio", is_flag=True, help="Estimate the ratio and stride of the training from losses on --text."
)
@click.option(
    "--text",
    metavar="FILE",
    help="Text for --guess-ratio: a few dozen samples like the training data, as JSONL or paragraphs.",
)
@flags_of(ThreadOptions, "Options")
@json_flag
def inspect(as_json: bool, **flags: Any) -> None:
    """Explain an adapter, a base model or an artifact."""
    from pos2d import exporter
    from pos2d.commands.shared.inspect_text import inspect_text

    report = exporter.inspect(**flags)
    show(report, as_json, inspect_text(report))
    report.raise_if_misfit()
