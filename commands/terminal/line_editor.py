"""Lines of input: on a terminal with editing and a stored history, from a pipe as they come."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from pos2d.commands.shared.streams import decode_input

HISTORY_LINES = 1000


def is_interactive() -> bool:
    """Whether standard input is a terminal; it may also be closed."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_message(prompt: str) -> str:
    """Read a line, and the lines after it while they end with a backslash.

    Raises:
        EOFError: the input has ended.
    """
    lines = [_read_line(prompt).rstrip("\n")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(_read_line("... ").rstrip("\n"))
    return "\n".join(lines)


def _read_line(prompt: str) -> str:
    if is_interactive() and sys.stdout.isatty():
        return input(prompt)
    if is_interactive():  # answers go to a file, but the prompt is for the person
        print(prompt, end="", file=sys.stderr, flush=True)
    line = _next_line()
    if not line:
        raise EOFError
    return line


def _next_line() -> str:
    """A line of standard input, with its line break; empty at the end.

    Raises:
        UnicodeDecodeError: the line is not text.
        InputError: the input is text in UTF-16 or UTF-32.
    """
    buffer = getattr(sys.stdin, "buffer", None)
    if buffer is None:
        return sys.stdin.readline() if sys.stdin is not None else ""
    return decode_input(buffer.readline())


@contextlib.contextmanager
def line_editing() -> Iterator[None]:
    """Let ``input`` edit lines inside the block, with the history of earlier runs."""
    if not is_interactive():
        yield
        return
    try:
        import readline
    except ImportError:  # Windows has no readline; its console edits lines itself
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
