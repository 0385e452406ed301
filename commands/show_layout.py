"""Draw where tokens stand."""

from typing import Any

import click

from pos2d.commands.shared.options import json_option, place_options, text_or_file
from pos2d.commands.shared.report import show


@click.command(name="show-layout")
@click.argument("artifact", required=False)
@click.option("-p", "--prompt", multiple=True, required=True, metavar="TEXT", help="Repeat it for several branches.")
@click.option("--context", metavar="TEXT|@FILE", callback=text_or_file, help="Stands before all prompts.")
@click.option("--token", metavar="SLOT_OR_TEXT", help="Show what this one sees.  [default: the last]")
@place_options
@click.option("--ignore-chat-template", is_flag=True, help="Take the texts as they are.")
@click.option("-o", "--output", metavar="FILE.svg", help="Write a picture instead of text.")
@click.option("--force", is_flag=True, help="Replace FILE.svg.")
@json_option
def show_layout(as_json: bool, **flags: Any) -> None:
    """Draw prompts by branch and time, and what one token of them sees; no weight is read.

    The tokens are those of an ARTIFACT; without one, words stand for them, columnar, left, with a stride of 128.
    """
    from pos2d import runtime
    from pos2d.commands.terminal.panels import print_layout

    report = runtime.show_layout(**flags)
    if as_json or report.output:
        show(report, as_json, "\n".join([f"{report.output}:", *report.lines]))
    else:
        print_layout(report)
