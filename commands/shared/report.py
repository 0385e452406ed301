"""How the command line shows what a verb returns."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import click

from pos2d.commands.shared.flags import in_terms_of_flags
from pos2d.commands.shared.streams import print_json, print_out


def show(report: Any, as_json: bool, summary: str) -> None:
    """Print a report: as JSON for programs, else its summary."""
    if as_json:
        print_json(dataclasses.asdict(report), indent=2)
    else:
        print_out(summary)


def warn(warnings: Iterable[str], notes: Iterable[str] = ()) -> None:
    """Print notes and warnings of the library on standard error, with its parameters as flags."""
    for label, messages in (("note", notes), ("warning", warnings)):
        for message in messages:
            click.echo(f"{label}: {in_terms_of_flags(message)}", err=True)
