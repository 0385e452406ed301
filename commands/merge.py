"""``pos2d merge``: its flags, its call, and how its report is shown."""

from typing import TYPE_CHECKING, Any

import click

from pos2d.commands.shared.flags import flags_of, force_flag, json_flag, output_flag
from pos2d.commands.shared.help import SectionedCommand
from pos2d.commands.shared.report import show, warn
from pos2d.commands.shared.tables import table
from pos2d.exporter.merge import MergeOptions
from pos2d.exporter.merging.ledger import figures_by_kind
from pos2d.sources.base_options import BaseOptions
from pos2d.sources.positions import TrainedPositions
from pos2d.spec import spans
from pos2d.threads import ThreadOptions
from pos2d.units import size_text

if TYPE_CHECKING:
    from pos2d.exporter.merge import MergeReport
    from pos2d.exporter.merging.ledger import KindFigures, Ledger

HEAD = ("module", "tensors", "rank", "rms(delta)/rms(W)", "retention", "error", "changed")


@click.command(cls=SectionedCommand)
@flags_of(BaseOptions, "Options", required=("base_model", "lora"))
@flags_of(TrainedPositions, "Positions of the training")
@output_flag
@flags_of(MergeOptions, "Options")
@flags_of(ThreadOptions, "Options")
@click.option(
    "--dry-run", is_flag=True, help="Check everything, print the disk and memory that are needed, and write nothing."
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue an interrupted merge of the same inputs. Without it, an interrupted merge is an error.",
)
@force_flag
@json_flag
def merge(as_json: bool, **flags: Any) -> None:
    """Merge adapters into their base model, and store how positions are encoded.

    The output is a Hugging Face model directory. The options under "Positions of the training" must have the values of
    the training, which the trainer does not save; wrong ones give wrong answers without an error.
    """
    from pos2d import exporter

    report = exporter.merge(**flags)
    warn(report.warnings, report.notes)
    show(report, as_json, report_text(report))


def report_text(report: "MergeReport") -> str:
    """What was changed, by kind of module, then the positions, then what was written or would be."""
    rope = report.rope_2d
    rotation = f"frequencies {spans(rope['pair_indices'])} of {len(rope['axes'])} rotate with branch and time"
    layout = f"stride {rope['branch_stride']}, align {rope['align_to']}, {rope['visibility']}"
    lines = [f"positions: {rotation}; {layout}" if rope["pair_indices"] else "positions: no 2D RoPE"]
    if report.untied:
        lines.append("the adapter changes head and embedding differently, so they are two tensors now")
    if report.tokenizer != "base":
        lines.append(f"tokenizer: that of {report.tokenizer}, not that of the base")
    if report.totals is None or report.ledger is None:
        needs = report.needs
        disk = f"{size_text(needs.disk)} of disk ({size_text(needs.disk_free)} free)"
        memory = f"{size_text(needs.memory)} of memory ({size_text(needs.memory_available)} available)"
        return "\n".join([*lines, f"{report.output}: needs {disk} and {memory}"])
    changed = report.totals.merged + report.totals.replaced
    summary = f"{changed} of {report.totals.tensors} tensors changed ({report.dtype}), {size_text(report.bytes)}"
    tables = filter(None, [ledger_table(report.ledger)])
    if report.was_finished:
        return "\n".join([*tables, *lines, f"{report.output}: was finished already, nothing was written; {summary}"])
    return "\n".join([*tables, *lines, f"{report.output}: {summary} in {report.seconds:.1f} s"])


def ledger_table(ledger: "Ledger") -> str:
    """The changed tensors by kind of module; an empty text if nothing is changed."""
    rows = [_cells(figures) for figures in figures_by_kind(ledger)]
    return table(HEAD, rows) if rows else ""


def _cells(figures: "KindFigures") -> tuple[str, ...]:
    ranks = figures.ranks
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}" if ranks else "-"
    numbers = (
        (figures.delta_ratio, ".2e"),
        (figures.retention, ".1%"),
        (figures.error, ".2g"),
        (figures.changed, ".1%"),
    )
    return (
        figures.kind,
        str(figures.tensors),
        rank,
        *("-" if value is None else format(value, form) for value, form in numbers),
    )
