"""The check at the end of an export: ``verify``, in a separate process that reads only the written files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pos2d
from pos2d.errors import ParityError, Pos2DError
from pos2d.progress import Progress
from pos2d.sources.files.parallel import thread_limit

# pos2d is imported from the same directory as in this process. The other paths go to the end of sys.path: a user's file
# that has the name of a module must not be imported in place of the standard library's or an installed package's.
PROGRAM = (
    "import sys; sys.path.insert(0, {root!r}); import pos2d; del sys.path[0]; sys.path += {paths!r}; "
    "from pos2d.commands.main import main; main()"
)


def closing_check(staging: Path, merged: Path | None) -> dict[str, Any]:
    """Run ``verify`` on the artifact at ``staging`` and return its report.

    The artifact is compared with the directory ``merged``; a quantised one (None) with itself, computed with float
    activations, and with the predictions of the exact model that the export stored in it. Exporter and runtime meet
    nowhere else.

    Raises:
        ParityError: the logits differ by more than they may.
        Pos2DError: ``verify`` itself failed.
    """
    against = [] if merged is None else ["--against", str(merged.absolute())]
    threads = [] if thread_limit() is None else ["--threads", str(thread_limit())]
    with Progress("verifying", 1):
        done = run_verb("verify", str(staging.absolute()), *against, *threads, "--json")
    if done.returncode not in (0, ParityError.exit_code):
        raise Pos2DError(f"verify ended with exit code {done.returncode}: {_last_line(done.stderr)}")
    report: dict[str, Any] = json.loads(done.stdout)
    if not report["passed"]:
        raise ParityError(_disagreement(report, merged))
    return report


def run_verb(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the command line in a separate process, with the package that this module is part of.

    The process never imports from the current directory, and from the paths of PYTHONPATH only what is nowhere else.
    """
    root = str(Path(pos2d.__file__).resolve().parents[1])
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    program = PROGRAM.format(root=root, paths=list(map(os.path.abspath, inherited)))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def _disagreement(report: dict[str, Any], merged: Path | None) -> str:
    """The sentence for a failed report, with the options that would pass where the report names them."""
    if merged is not None:
        return (
            f"what was exported does not agree with {merged}: logits differ by up to {report['max_rel_diff']:.1e} of "
            f"the largest (tolerance {report['rtol']:.0e}), {_figures(report)}; no artifact was written"
        )
    if report["cure"]:
        return (
            f"rounding activations to 8 bits changes the logits: {_figures(report)}; no artifact was written; export "
            f"again with {report['cure']}"
        )
    return (
        f"the quantised graphs are too far from the exact model: {_figures(report['exact'])}; no artifact was written; "
        "export again with more bits or smaller blocks, or keep this result with `no_verify=True`"
    )


def _figures(report: dict[str, Any]) -> str:
    return (
        f"the mean KL is {report['mean_kl']:.0e} (at most {report['max_mean_kl']:.0e}), and the top token agrees on "
        f"{report['top1_agreement']:.1%} (at least {report['min_top1']:.0%})"
    )


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1].removeprefix("error: ") if text.strip() else "it printed no message"
