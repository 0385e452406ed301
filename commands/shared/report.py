"""How the command line shows what a verb returns."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import click


def show(report: Any, as_json: bool, summary: str) -> None:
    """A report on standard output: JSON for programs, else its summary."""
    click.echo(json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False) if as_json else summary)


def warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
