"""Compare an artifact's logits with a reference."""

from typing import Any

import click

from pos2d.commands.shared.options import json_option
from pos2d.commands.shared.report import show


@click.command()
@click.argument("artifact")
@click.option(
    "--against",
    metavar="MERGED_OR_ONNX",
    help="The reference: another artifact of the same model. A quantised graph needs none.",
)
@click.option(
    "--rtol",
    type=float,
    default=1e-3,
    show_default=True,
    help="With --against: largest difference of a logit that passes, as a share of the largest logit.",
)
@json_option
def verify(as_json: bool, **flags: Any) -> None:
    """Compare an ARTIFACT's logits with a reference, on one branch and on several.

    A quantised graph is compared with itself, but with float activations; where it fails, the flags are named with
    which an export passes.
    """
    from pos2d import runtime

    report = runtime.verify(**flags)
    lines = [
        f"{case.name}: max |d logit| {case.max_abs_diff:.2e}, top-1 {case.top1_agreement:.1%}, "
        f"KL {case.mean_kl:.1e} ({case.positions} positions)"
        for case in report.cases
    ]
    show(report, as_json, "\n".join([*lines, "passed" if report.passed else "failed"]))
    report.raise_if_failed()
