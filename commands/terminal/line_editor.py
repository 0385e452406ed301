"""Lines of a person at a terminal, with editing and a history that lasts; from a pipe, lines as they come."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

HISTORY_LINES = 1000


def at_terminal() -> bool:
    """Whether a person is at standard input, which may be closed."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_message(prompt: str) -> str:
    """A line, and further ones while they end with a backslash.

    Raises:
        EOFError: there are no more.
    """
    lines = [_read_line(prompt).rstrip("\n")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(_read_line("... ").rstrip("\n"))
    return "\n".join(lines)


def _read_line(prompt: str) -> str:
    if at_terminal() and sys.stdout.isatty():
        return input(prompt)
    if at_terminal():  # answers go to a file, and the person is asked all the same
        print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline() if sys.stdin is not None else ""
    if not line:
        raise EOFError
    return line


@contextlib.contextmanager
def with_line_editing() -> Iterator[None]:
    """While this lasts ``input`` edits lines, and remembers those of earlier runs."""
    if not at_terminal():
        yield
        return
    try:
        import readline
    except ImportError:  # there is none on Windows, where the console edits
        yield
        return
    path = history_file()
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)


def history_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "pos2d" / "chat_history"
