"""``pos2d show-layout``: its flags, its call, and how its report is shown."""

from typing import Any

import click

from pos2d.commands.shared.flags import context_flag, flags_of, json_flag, prompt_flag
from pos2d.commands.shared.help import SectionedCommand
from pos2d.commands.shared.report import show
from pos2d.runtime.text.options import LayoutOptions, PromptOptions


@click.command(name="show-layout", cls=SectionedCommand)
@click.argument("model", required=False)
@prompt_flag(required=True)
@context_flag
@click.option(
    "--token",
    metavar="SLOT_OR_TEXT",
    help="Token whose attention is shown: its index in the sequence, or its text.  [default: the last token]",
)
@flags_of(LayoutOptions, "Branches", without=("max_branches",))
@flags_of(PromptOptions, "Options")
@click.option("-o", "--output", metavar="FILE.svg", help="Write a picture instead of text.")
@click.option("--force", is_flag=True, help="Replace FILE.svg.")
@json_flag
def show_layout(as_json: bool, **flags: Any) -> None:
    """Draw the branch and time of every token of the prompts, and mark the tokens that one of them attends to.

    The tokens are those of a MODEL's tokenizer; no weights are read. Without a model, words stand for tokens,
    with columnar visibility, left alignment and a stride of 128.
    """
    from pos2d import runtime
    from pos2d.commands.terminal.panels import print_layout

    report = runtime.show_layout(**flags)
    if as_json or report.output:
        show(report, as_json, "\n".join([f"{report.output}:", *report.lines]))
    else:
        print_layout(report)
