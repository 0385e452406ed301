"""``pos2d batch``: its flags, its call, and how its report is shown."""

from typing import Any

import click

from pos2d.commands.shared.flags import context_flag, flags_of, json_flag
from pos2d.commands.shared.help import SectionedCommand
from pos2d.commands.shared.presets import list_presets_flag
from pos2d.commands.shared.report import show, warn
from pos2d.errors import InputError
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.cluster.options import ClusterOptions
from pos2d.runtime.engine.sampling import SamplingOptions
from pos2d.runtime.text.options import ContextOptions, LayoutOptions, PromptOptions


@click.command(cls=SectionedCommand)
@click.argument("model")
@click.option(
    "-i",
    "--input",
    required=True,
    metavar="IN.jsonl",
    help="File to read, or - for standard input: one request on each line.",
)
@click.option(
    "-o", "--output", required=True, metavar="OUT.jsonl", help="File to write: one record for each line, in order."
)
@context_flag
@flags_of(ContextOptions, "Options")
@flags_of(SamplingOptions, "Sampling")
@list_presets_flag
@flags_of(LayoutOptions, "Branches")
@flags_of(PromptOptions, "Options")
@flags_of(LoadOptions, "Loading")
@flags_of(ClusterOptions, "Many machines")
@click.option("--force", is_flag=True, help="Start over, and replace the output of an earlier run.")
@json_flag
def batch(as_json: bool, **flags: Any) -> None:
    """Answer every line of a file. The same command continues a batch that was interrupted.

    \b
    A line is one of
      {"prompt": "..."}
      {"messages": [{"role": "user", "content": "..."}, ...]}
      {"prompts": ["...", "..."]}, with or without "context": "..."
      {"branches": ["...", "..."]}, which is the same in the trainer's words
      "...||...", with the texts of several branches

    Objects may have options under "Sampling" and "Branches" as further keys, written with underscores; they take
    precedence over the flags. Other keys, such as an id, are copied to the record. --context is that of every line
    that has none.

    The exit code is 3 if no line could be answered.
    """
    from pos2d import runtime

    report = runtime.batch(**flags)
    warn(report.warnings)
    show(report, as_json, report.summary())
    if report.has_failed:
        raise InputError("no line has an answer")
