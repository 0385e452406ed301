"""Perplexity of an artifact, and its distance from a reference."""

from typing import TYPE_CHECKING, Any

import click

from pos2d.commands.shared.flags import flags_of, json_flag
from pos2d.commands.shared.help import SectionedCommand
from pos2d.commands.shared.report import show
from pos2d.commands.shared.tables import table
from pos2d.runtime.backends.options import LoadOptions

if TYPE_CHECKING:
    from pos2d.runtime import EvalReport
    from pos2d.runtime.evaluate import CaseFigures

HEAD = ("", "samples", "tokens read", "predicted", "perplexity")
REFERENCE_HEAD = ("reference", "nll change", "KL", "top-1")


@click.command(name="eval", cls=SectionedCommand)
@click.argument("model")
@click.option(
    "--against",
    metavar="MODEL",
    help="Reference: another artifact of the same model, or a plain model; it runs on the CPU in float32.",
)
@click.option(
    "--text",
    required=True,
    metavar="FILE",
    help="JSONL, or paragraphs with blank lines between them. Samples are cut at 512 tokens, the text at 10,000.",
)
@click.option(
    "--branches",
    type=int,
    default=4,
    show_default=True,
    help="Number of samples that are scored together as branches; 1 scores them alone only.",
)
@flags_of(LoadOptions, "Loading")
@json_flag
def evaluate(as_json: bool, **flags: Any) -> None:
    """Measure the perplexity of a MODEL on a text, and with --against the KL and top-1 agreement with a reference.

    Samples are scored alone, and then together as branches. In a conversation the last turn is scored, in other texts
    every token but the first.
    """
    from pos2d import runtime

    report = runtime.evaluate(**flags)
    show(report, as_json, report_text(report))


def report_text(report: "EvalReport") -> str:
    has_reference = report.cases[0].top1_agreement is not None
    head = (*HEAD, *REFERENCE_HEAD) if has_reference else HEAD
    skipped = [f"columns: skipped, {report.columns_skipped}"] if report.columns_skipped else []
    return "\n".join([f"{report.text}, {report.visibility}", table(head, map(_cells, report.cases)), *skipped])


def _cells(case: "CaseFigures") -> tuple[str, ...]:
    counts = map(str, (case.samples, case.tokens_read, case.tokens))
    cells = (case.name, *counts, _with_error(case.perplexity, case.perplexity_error, ".4g"))
    if case.top1_agreement is None:
        return cells
    return (
        *cells,
        _with_error(case.reference_perplexity, case.reference_perplexity_error, ".4g"),
        _with_error(case.nll_change, case.nll_change_error, "+.2g"),
        _with_error(case.mean_kl, case.mean_kl_error, ".2g"),
        f"{case.top1_agreement:.1%}",
    )


def _with_error(value: float | None, error: float | None, form: str) -> str:
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:.1g}"
