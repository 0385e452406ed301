"""``pos2d export``: its flags, its call, and how its report is shown."""

from typing import Any

import click

from pos2d.commands.shared.flags import base_flags, flags_of, force_flag, json_flag, output_flag
from pos2d.commands.shared.help import SectionedCommand
from pos2d.commands.shared.report import show, warn
from pos2d.exporter.formats.options import ExportOptions
from pos2d.sources.positions import TrainedPositions
from pos2d.threads import ThreadOptions


@click.command(cls=SectionedCommand)
@click.argument("merged", required=False)
@output_flag
@flags_of(ExportOptions, "Options")
@flags_of(ThreadOptions, "Options")
@base_flags("From a base model and adapters, without MERGED", required=False)
@flags_of(TrainedPositions, "From a base model and adapters, without MERGED")
@force_flag
@json_flag
def export(as_json: bool, **flags: Any) -> None:
    """Write ONNX graphs or a bitsandbytes checkpoint.

    The weights come from a MERGED directory, or from --base-model and --lora. In the second case the sum of base and
    adapter is quantised exactly, without being rounded to the type of the base model first.

    ONNX graphs are checked at the end, and deleted if they fail: float graphs of a MERGED directory are compared with
    it, and quantised graphs with the same graphs in float activations and with the exact model on a held-out text.
    Float graphs from --base-model are not checked.
    """
    from pos2d import exporter

    report = exporter.export(**flags)
    warn(report.warnings, report.notes)
    show(report, as_json, report.summary())
