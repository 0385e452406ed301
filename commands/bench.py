"""Time an artifact on this machine."""

from typing import Any

import click

from pos2d.commands.shared.options import json_option, loading_options, whole_numbers
from pos2d.commands.shared.report import show


@click.command()
@click.argument("artifact")
@click.option("-p", "--prompt-tokens", type=int, default=512, show_default=True, help="Random tokens that are read.")
@click.option("-g", "--new-tokens", type=int, default=64, show_default=True, help="Of every answer.")
@click.option(
    "-n",
    "--branches",
    default="1,2,4,8,16",
    show_default=True,
    callback=whole_numbers,
    help="Answers side by side over the one prompt.",
)
@click.option("-r", "--rounds", type=int, default=3, show_default=True, help="Medians are taken over them.")
@loading_options
@json_option
def bench(as_json: bool, **flags: Any) -> None:
    """Time an ARTIFACT on this machine: reading, first token, steps, memory."""
    from pos2d import runtime

    report = runtime.bench(**flags)
    show(report, as_json, "\n".join(report.lines()))
