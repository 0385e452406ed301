"""Time a model on this machine."""

from typing import TYPE_CHECKING, Any

import click

from pos2d.commands.shared.flags import flags_of, json_flag, whole_numbers
from pos2d.commands.shared.help import SectionedCommand
from pos2d.commands.shared.report import show
from pos2d.commands.shared.tables import table
from pos2d.runtime.backends.options import LoadOptions

if TYPE_CHECKING:
    from pos2d.runtime import BenchReport
    from pos2d.runtime.bench import BenchRow

HEAD = ("branches", "prefill s", "first token s", "step ms", "tokens/s", "answers s", "bandwidth")


@click.command(cls=SectionedCommand)
@click.argument("model")
@click.option(
    "--prompt-tokens",
    type=int,
    default=512,
    show_default=True,
    help="Length of the prompt, in random tokens; all branches share it.",
)
@click.option("--new-tokens", type=int, default=64, show_default=True, help="Number of new tokens for each answer.")
@click.option(
    "--branches",
    default="1,2,4,8,16",
    show_default=True,
    callback=whole_numbers,
    metavar="N,N,...",
    help="Numbers of branches to measure; a branch is one answer to the prompt.",
)
@click.option("--rounds", type=int, default=3, show_default=True, help="Number of rounds; the report has medians.")
@flags_of(LoadOptions, "Loading")
@json_flag
def bench(as_json: bool, **flags: Any) -> None:
    """Measure the speed and memory of a MODEL on this machine: prefill, first token, decode steps."""
    from pos2d import runtime

    report = runtime.bench(**flags)
    show(report, as_json, report_text(report))


def report_text(report: "BenchReport") -> str:
    return "\n".join(
        [
            f"{report.model}: {report.format}; prompt of {report.prompt_tokens} tokens, {report.new_tokens} new "
            f"tokens per answer, medians of {report.rounds} rounds",
            table(HEAD, map(_cells, report.rows)),
            f"load to first token {report.load_seconds:.2f} s, peak memory {report.peak_bytes / 1e6:.0f} MB, "
            f"memory reads {report.memory_bytes_per_second / 1e9:.1f} GB/s",
        ]
    )


def _cells(row: "BenchRow") -> tuple[str, ...]:
    return (
        str(row.branches),
        f"{row.prefill_seconds:.3f}",
        f"{row.first_token_seconds:.3f}",
        f"{row.step_ms:.2f}",
        f"{row.tokens_per_second:.1f}",
        f"{row.answers_seconds:.2f}",
        "" if row.bandwidth_share is None else f"{row.bandwidth_share:.0%}",
    )
