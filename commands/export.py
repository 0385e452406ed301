"""Turn weights into ONNX graphs or a bitsandbytes checkpoint."""

from typing import Any

import click

from pos2d.commands.shared.options import (
    adapter_options,
    dtype_choice,
    force_option,
    json_option,
    output_option,
    quantising_options,
    shard_option,
)
from pos2d.commands.shared.report import show, warn


@click.command()
@click.argument("merged", required=False)
@output_option
@click.option(
    "--format",
    type=click.Choice(["onnx", "bnb"]),
    default="onnx",
    show_default=True,
    help="onnx: graphs with their KV cache; bnb: a bitsandbytes checkpoint.",
)
@quantising_options
@adapter_options(required=False)
@click.option(
    "--dtype",
    type=dtype_choice,
    default="auto",
    show_default=True,
    help="Of what is not quantised, and of a graph's activations and cache: float32, or float16 for a card.",
)
@shard_option
@click.option("--no-verify", is_flag=True, help="Of onnx: skip the closing check, which is what verify does.")
@click.option("--no-calibration", is_flag=True, help="Of onnx: round every value for itself: much faster, and worse.")
@force_option
@json_option
def export(as_json: bool, **flags: Any) -> None:
    """Turn a MERGED directory into ONNX graphs that take pos2d, or into a bitsandbytes checkpoint.

    Both also start from --base-model and --lora: then the exact sum is stored or quantised, before any rounding. A
    graph of a MERGED directory is held against it before it is kept, a quantised one against float activations.
    """
    from pos2d import exporter

    report = exporter.export(**flags)
    warn(report.warnings)
    show(report, as_json, report.summary())
