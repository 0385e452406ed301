"""The check that ends an export: ``verify``, in a process of its own and from the written files alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pos2d.errors import ParityError, Pos2DError
from pos2d.progress import Progress


def closing_check(staging: Path, merged: Path | None) -> dict[str, Any]:
    """What ``verify`` says of the artifact at ``staging``: against the directory ``merged`` where it is exact, against
    itself with float activations where it is quantised. Exporter and runtime meet nowhere else.

    Raises:
        ParityError: it did not pass.
        Pos2DError: the check itself broke.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    against = [] if merged is None else ["--against", str(merged)]
    command = [sys.executable, "-m", "cli", "verify", str(staging), *against, "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with Progress("verifying", 1):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == ParityError.exit_code:
        what = f"with {merged}" if merged is not None else "with its own weights"
        raise ParityError(f"the exported graph does not agree {what}; nothing was kept. {_last_line(done.stderr)}")
    if done.returncode != 0:
        raise Pos2DError(f"verify ended with exit code {done.returncode}: {_last_line(done.stderr)}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1].removeprefix("error: ") if text.strip() else "it said nothing"
