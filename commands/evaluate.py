"""Perplexity of an artifact, and its distance from a reference."""

from typing import Any

import click

from pos2d.commands.shared.options import json_option, loading_options
from pos2d.commands.shared.report import show


@click.command(name="eval")
@click.argument("artifact")
@click.option("--against", metavar="REF", help="Another artifact of the same model, read on the CPU in float32.")
@click.option(
    "--text",
    required=True,
    metavar="FILE",
    help="JSONL, or paragraphs. Samples are cut at 512 tokens; reading ends after 10,000 tokens.",
)
@click.option("--branches", type=int, default=4, show_default=True, help="Samples side by side; 1 leaves columns out.")
@loading_options
@json_option
def evaluate(as_json: bool, **flags: Any) -> None:
    """Perplexity of an ARTIFACT on a text, and its KL and top token against a reference.

    Samples are read one after the other, then side by side. Of a conversation the last turn is predicted, of other
    texts everything.
    """
    from pos2d import runtime

    report = runtime.evaluate(**flags)
    show(report, as_json, "\n".join(report.lines()))
