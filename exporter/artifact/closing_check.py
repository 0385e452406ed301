"""The check that ends an export: ``verify``, in a process of its own and from the written files alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pos2d
from pos2d.errors import ParityError, Pos2DError
from pos2d.progress import Progress

# Nothing but the standard library and the installed packages may come before what is given here: a file of the user's
# that has the name of a module is not to be run.
PROGRAM = "import sys; sys.path += {paths!r}; from pos2d.commands.main import main; main()"


def closing_check(staging: Path, merged: Path | None) -> dict[str, Any]:
    """What ``verify`` says of the artifact at ``staging``: against the directory ``merged`` where it is exact, against
    itself with float activations where it is quantised. Exporter and runtime meet nowhere else.

    Raises:
        ParityError: it did not pass.
        Pos2DError: the check itself broke.
    """
    against = [] if merged is None else ["--against", str(merged.absolute())]
    with Progress("verifying", 1):
        done = run_verb("verify", str(staging.absolute()), *against, "--json")
    if done.returncode == ParityError.exit_code:
        what = f"with {merged}" if merged is not None else "with its own weights"
        raise ParityError(f"the exported graph does not agree {what}; nothing was kept. {_last_line(done.stderr)}")
    if done.returncode != 0:
        raise Pos2DError(f"verify ended with exit code {done.returncode}: {_last_line(done.stderr)}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def run_verb(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A verb of the command line in a process of its own, on this very package.

    The process never searches the current directory. What this process finds through PYTHONPATH is searched last.
    """
    root = str(Path(pos2d.__file__).resolve().parents[1])
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    program = PROGRAM.format(paths=[root, *map(os.path.abspath, inherited)])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1].removeprefix("error: ") if text.strip() else "it said nothing"
