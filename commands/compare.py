"""``pos2d compare``: its flags, its call, and how its report is shown."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from pos2d.commands.shared.flags import flags_of, in_terms_of_flags, json_flag
from pos2d.commands.shared.help import SectionedCommand
from pos2d.commands.shared.report import show, warn
from pos2d.commands.shared.tables import table
from pos2d.sources.base_options import BaseOptions
from pos2d.sources.positions import TrainedPositions
from pos2d.threads import ThreadOptions
from pos2d.units import size_text

if TYPE_CHECKING:
    from pos2d.runtime.comparison.files import FileEvidence
    from pos2d.runtime.comparison.logits import Distance
    from pos2d.runtime.comparison.report import ArtifactReport, CompareReport, Figures

HEAD = ("", "weights", "size", "tokens/s", "perplexity", "KL", "top-1")
COLUMNS = ("perplexity", "KL", "top-1")


@click.command(cls=SectionedCommand)
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT...")
@click.option(
    "--text",
    metavar="FILE",
    help="JSONL, or paragraphs with blank lines between them, best like those of the training.  [default: twelve "
    "questions with short answers]",
)
@click.option(
    "-p",
    "--prompt",
    multiple=True,
    metavar="TEXT",
    help="Prompt for the greedy answers. Repeat the flag for several.  [default: the first four of the text]",
)
@click.option(
    "--branches",
    type=int,
    default=4,
    show_default=True,
    help="Number of samples that are compared side by side as well; 1 compares one branch only.",
)
@click.option(
    "--max-new-tokens", type=int, default=64, show_default=True, help="Length of the greedy answers that are compared."
)
@click.option(
    "--plot", metavar="FILE.svg", help="Draw the KL at every step of the greedy answers; the file is replaced."
)
@flags_of(BaseOptions, "What the artifacts were made from", required=("base_model", "lora"))
@flags_of(TrainedPositions, "Positions of the training")
@flags_of(ThreadOptions, "Options")
@json_flag
def compare(as_json: bool, **flags: Any) -> None:
    """Compare every ARTIFACT with the base and the adapter that it was made from, and say where it went wrong.

    An ARTIFACT is any that pos2d runs, or a Hugging Face directory that another tool merged. The reference is the
    unmerged model in float32, W x + scale B (A x), with the positions of the training. KL, in nats a token, and the
    share of equal top tokens are distances from it, in one branch and in several. Graphs and quantised weights compute
    in their own type, all others in float32 on the CPU.

    One sentence for each artifact names what is wrong: the adapter is not in effect, applied twice, at another strength
    or in a part of the layers; rounding or quantisation; positions, chat template, tokenizer, special or end tokens; or
    another base.

    The exit code is 7 if something is wrong. What rounding and quantisation cost is no fault, unless rounding lost more
    than a tenth of the adapter.
    """
    from pos2d import runtime

    report = runtime.compare(**flags)
    warn(report.warnings, report.notes)
    show(report, as_json, report_text(report))
    report.raise_if_failed()


def report_text(report: "CompareReport") -> str:
    figures = [report.base, report.unmerged, *(artifact.figures for artifact in report.artifacts)]
    has_columns = any(model.columns for model in figures)
    side_by_side = tuple(f"{name}, {report.branches} columns" for name in COLUMNS) if has_columns else ()
    lines = [report.text, table((*HEAD, *side_by_side), (_cells(model, has_columns) for model in figures))]
    for artifact in report.artifacts:
        lines += ["", f"{artifact.figures.name}: {in_terms_of_flags(artifact.verdict.sentence)}", *_details(artifact)]
    if report.plot is not None:
        lines += ["", f"KL by step: {report.plot}"]
    return "\n".join(lines)


def _cells(figures: "Figures", has_columns: bool) -> tuple[str, ...]:
    speed = "-" if figures.tokens_per_second is None else f"{figures.tokens_per_second:.1f}"
    cells = (figures.name, figures.computed_in, size_text(figures.bytes), speed, *_distance(figures.one_branch))
    return (*cells, *_distance(figures.columns)) if has_columns else cells


def _distance(distance: "Distance | None") -> tuple[str, ...]:
    if distance is None:
        return ("-", "-", "-")
    return (f"{distance.perplexity:.4g}", f"{distance.mean_kl:.2g}", f"{distance.top1_agreement:.1%}")


def _details(artifact: "ArtifactReport") -> Iterator[str]:
    """Where greedy answers part, and whether the small files are those of the training."""
    for parting in artifact.partings:
        expected, token = (repr(word) for word in (parting.expected, parting.token))
        yield (
            f"  prompt {parting.prompt}: answers part at token {parting.step + 1}, {token} in place of {expected} "
            f"(logits of {expected} and {token}: unmerged {_pair(parting.unmerged_logits)}, here "
            f"{_pair(parting.artifact_logits)})"
        )
    if artifact.kl_by_step and not artifact.partings:
        yield "  greedy answers are the same"
    yield f"  {_files(artifact.files)}"


def _files(files: "FileEvidence") -> str:
    checked = {
        "tokenizer": files.tokenizer,
        "special tokens": files.special_tokens,
        "chat template": files.chat_template,
        "end tokens": files.end_tokens,
    }
    same = [name for name, difference in checked.items() if not difference]
    others = [f"{name}: {difference}" for name, difference in checked.items() if difference]
    return "; ".join([*([f"{', '.join(same)}: as in the training"] if same else []), *others])


def _pair(logits: tuple[float, float]) -> str:
    return " and ".join(f"{value:.4g}" for value in logits)
