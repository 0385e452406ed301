"""A command as somebody at a terminal sees it."""

import contextlib
import os
import pty
import subprocess
from collections.abc import Sequence

STREAMS = ("stdin", "stdout", "stderr")


def shown_on_terminal(command: Sequence[str], streams: Sequence[str], columns: int) -> str:
    """What ``command`` writes to those of ``stdin``, ``stdout``, ``stderr`` that are a terminal; it must succeed."""
    reader, writer = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "LINES": "30", "TERM": "xterm"}
    stdin, stdout, stderr = (writer if name in streams else subprocess.DEVNULL for name in STREAMS)
    shown = b""
    with subprocess.Popen(command, env=environment, stdin=stdin, stdout=stdout, stderr=stderr) as process:
        os.close(writer)
        with contextlib.suppress(OSError):  # the end of a terminal is an error
            while piece := os.read(reader, 65536):
                shown += piece
    os.close(reader)
    assert process.returncode == 0
    return shown.decode()
