"""How the command line shows what a verb returns."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import click

from pos2d.commands.shared.flags import in_terms_of_flags


def show(report: Any, as_json: bool, summary: str) -> None:
    """Print a report: as JSON for programs, else its summary."""
    click.echo(json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False) if as_json else summary)


def warn(warnings: Iterable[str]) -> None:
    """Print warnings of the library on standard error, with its parameters as flags."""
    for warning in warnings:
        click.echo(f"warning: {in_terms_of_flags(warning)}", err=True)
