"""``pos2d verify``: its flags, its call, and how its report is shown."""

from typing import Any

import click

from pos2d.commands.shared.flags import json_flag
from pos2d.commands.shared.help import SectionedCommand
from pos2d.commands.shared.report import show


@click.command(cls=SectionedCommand)
@click.argument("artifact")
@click.option(
    "--against",
    metavar="ARTIFACT",
    help="Reference: an artifact of the same model that is not quantised. Required, except for quantised ONNX graphs.",
)
@click.option(
    "--rtol",
    type=float,
    default=1e-3,
    show_default=True,
    help="With --against: largest allowed difference of a logit, relative to the largest logit.",
)
@json_flag
def verify(as_json: bool, **flags: Any) -> None:
    """Check that an ARTIFACT computes the logits that it should, on one branch and on several.

    A quantised ONNX graph is compared with the same weights in float activations, so this checks the rounding of
    activations only; eval measures what quantising the weights costs. If the check fails, the error names the flags of
    an export that passes. Everything is computed on the CPU.
    """
    from pos2d import runtime

    report = runtime.verify(**flags)
    lines = [
        f"{case.name}: largest difference of a logit {case.max_abs_diff:.2e}, same top token "
        f"{case.top1_agreement:.1%}, KL {case.mean_kl:.1e} ({case.positions} positions)"
        for case in report.cases
    ]
    show(report, as_json, "\n".join([*lines, "passed" if report.passed else "failed"]))
    report.raise_if_failed()
