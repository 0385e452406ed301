"""``pos2d verify``: its flags, its call, and how its report is shown."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from pos2d.commands.shared.flags import flags_of, json_flag
from pos2d.commands.shared.help import SectionedCommand
from pos2d.commands.shared.report import show
from pos2d.threads import ThreadOptions

if TYPE_CHECKING:
    from pos2d.runtime import ParityReport


@click.command(cls=SectionedCommand)
@click.argument("model")
@click.option(
    "--against",
    metavar="MODEL",
    help="Reference that is not quantised: an artifact of the same model, or a plain model. Without it, logits are "
    "compared only of quantised ONNX graphs.",
)
@click.option(
    "--rtol",
    type=float,
    default=1e-3,
    show_default=True,
    help="With --against: largest allowed difference of a logit, relative to the largest logit.",
)
@flags_of(ThreadOptions, "Options")
@json_flag
def verify(as_json: bool, **flags: Any) -> None:
    """Check that a MODEL has the files that were written, and computes the logits that it should.

    Every file but the model card is compared with the hash in the manifest. Logits are compared on one branch and on
    several, on the CPU: with those of --against, or, of a quantised ONNX graph, with the same weights in float
    activations, and with the predictions of the exact model that the export stored. eval measures on a text of your own
    what quantising costs.

    Logits must agree with --against within --rtol times the largest one, or ten times that at a single position, with
    the same top token at 99 % of the positions and a mean KL of at most 1e-6.

    The exit code is 3 if a file or a setting differs, and 7 if logits do.
    """
    from pos2d import runtime

    report = runtime.verify(**flags)
    passed = "passed" if report.cases else "passed: the files"
    show(report, as_json, "\n".join([*_lines(report), passed if report.passed else "failed"]))
    report.raise_if_failed()


def _lines(report: "ParityReport") -> Iterator[str]:
    if report.files:  # a plain model has no hashes
        yield f"{report.files} files are as they were written"
    for case in report.cases:
        yield (
            f"{case.name}: largest difference of a logit {case.max_abs_diff:.2e}, {case.max_rel_diff:.1e} of the "
            f"largest logit, same top token {case.top1_agreement:.1%}, KL {case.mean_kl:.1e} "
            f"({case.positions} positions)"
        )
    for distance in report.exact.cases if report.exact is not None else ():
        yield (
            f"{distance.name}, exact model: same top token {distance.top1_agreement:.1%}, KL {distance.mean_kl:.1e} "
            f"({distance.positions} positions)"
        )
    if not report.cases:
        yield "logits were not compared: that needs --against and an artifact of the same model that is not quantised"
