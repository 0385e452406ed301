"""Answer every line of a file."""

from typing import Any

import click

from pos2d.commands.shared.options import force_option, json_option, layout_options, loading_options, sampling_options
from pos2d.commands.shared.report import show, warn


@click.command()
@click.argument("artifact")
@click.option("-i", "--input", required=True, metavar="IN.jsonl", help="A line for every question.")
@click.option("-o", "--output", required=True, metavar="OUT.jsonl", help="A record for every line, in the same order.")
@sampling_options
@layout_options
@click.option("--ignore-chat-template", is_flag=True, help="Take the texts as they are.")
@loading_options
@force_option
@json_option
def batch(as_json: bool, **flags: Any) -> None:
    """Answer every line of a file; killed and started again, it goes on where it was.

    A line is {"prompt": ...}, {"messages": [...]}, {"context": ..., "prompts": [...]}, {"branches": [...]} or "a||b",
    with sampling options of its own where they differ from the flags.
    """
    from pos2d import runtime

    report = runtime.batch(**flags)
    warn(report.warnings)
    show(report, as_json, report.summary())
