"""Say what every format of a model needs."""

from typing import TYPE_CHECKING, Any

import click

from pos2d.commands.shared.flags import in_terms_of_flags, json_flag
from pos2d.commands.shared.help import SectionedCommand
from pos2d.commands.shared.report import show
from pos2d.commands.shared.tables import table
from pos2d.units import size_text

if TYPE_CHECKING:
    from pos2d.exporter.plan import PlanReport
    from pos2d.exporter.planning.footprint import Footprint


@click.command(cls=SectionedCommand)
@click.argument("model", metavar="MODEL")
@click.option(
    "--gpu-memory", metavar="SIZE", help="Plan for a GPU with this memory, such as 8GB.  [default: plan for the CPU]"
)
@click.option(
    "--branches", type=int, default=1, show_default=True, help="Number of branches: prompts that are answered together."
)
@click.option(
    "--context",
    type=int,
    default=4096,
    show_default=True,
    help="Positions in the KV cache, of all branches together.",
)
@json_flag
def plan(as_json: bool, **flags: Any) -> None:
    """Show what each format of a model or an artifact needs, and recommend the best one that fits.

    The best format loses the least quality on a GPU, and on the CPU it is the fastest one that loses little. No weights
    are read.
    """
    from pos2d import exporter

    report = exporter.plan(**flags)
    show(report, as_json, plan_text(report))


def plan_text(report: "PlanReport") -> str:
    """The candidates as a table, then the recommendation with its commands."""
    gpu = "" if report.gpu_memory is None else f", {size_text(report.gpu_memory)} on the GPU"
    work = f"{report.context:,} positions, {report.branches} branch{'es' if report.branches > 1 else ''}"
    head = f"{report.model}: {report.what}; {work}; {size_text(report.memory_available)} of memory available{gpu}"
    recommended = next((c for c in report.candidates if c.name == report.recommended), None)
    if recommended is None:
        advice = [report.reason]
    else:
        used = recommended.ram if recommended.vram is None or report.gpu_memory is None else recommended.vram
        commands = (f"  {command}" for command in recommended.commands)
        advice = [f"{recommended.name}: {report.reason} ({_parts(used)})", *commands]
    hint = [in_terms_of_flags(report.hint)] if report.hint else []
    return "\n".join([head, _table(report), "", *advice, *hint])


def _table(report: "PlanReport") -> str:
    rows = (
        (
            candidate.name,
            size_text(candidate.disk),
            size_text(candidate.ram.peak),
            size_text(candidate.vram.peak) if candidate.vram else "-",
            "yes" if candidate.name in report.fitting else "no",
            candidate.note,
        )
        for candidate in report.candidates
    )
    return table(("format", "disk", "RAM", "VRAM", "fits", "note"), rows)


def _parts(used: "Footprint") -> str:
    parts = {"weights": used.weights, "cache": used.cache, "activations": used.activations, "process": used.process}
    text = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())
    if used.loading > used.weights + used.cache + used.activations:
        return f"{text}; the peak is while loading, with {size_text(used.loading)} of weights"
    return text
