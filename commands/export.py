"""``pos2d export``: its flags, its call, and how its report is shown."""

from typing import Any

import click

from pos2d.commands.shared.flags import FROM_BASE, flags_of, force_flag, json_flag, output_flag
from pos2d.commands.shared.help import SectionedCommand
from pos2d.commands.shared.report import show, warn
from pos2d.exporter.formats.options import ExportOptions
from pos2d.sources.base_options import BaseOptions
from pos2d.sources.positions import TrainedPositions
from pos2d.threads import ThreadOptions


@click.command(cls=SectionedCommand)
@click.argument("model", required=False)
@output_flag
@flags_of(ExportOptions, "Options")
@flags_of(ThreadOptions, "Options")
@flags_of(BaseOptions, FROM_BASE)
@flags_of(TrainedPositions, FROM_BASE)
@force_flag
@json_flag
def export(as_json: bool, **flags: Any) -> None:
    """Write ONNX graphs, a bitsandbytes checkpoint, or what other programs load: a stock checkpoint, a GGUF file, or a
    graph for onnxruntime-genai.

    MODEL is a directory that merge wrote, or a plain model: a Hugging Face directory, or NAME@REVISION on the Hugging
    Face Hub. With --base-model and --lora in its place, the sum of base and adapter is quantised exactly, without being
    rounded to the type of the base model first.

    ONNX graphs are checked at the end, and deleted if they fail: float graphs of a MODEL are compared with it, and
    quantised graphs with the same graphs in float activations and with the exact model on a held-out text. A stock
    checkpoint is compared with MODEL, too, unless it is rounded further. Float weights from --lora are not
    checked, except in a GGUF file: it is read back, and all that it has is compared with the exact sum.
    """
    from pos2d import exporter

    report = exporter.export(**flags)
    warn(report.warnings, report.notes)
    show(report, as_json, report.summary())
