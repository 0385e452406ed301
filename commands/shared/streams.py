"""Standard input, output and error: closed ones, full ones, and terminals and pipes that are not UTF-8."""

import codecs
import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import click

from pos2d.errors import InputError, StorageError
from pos2d.text_files import check_encoding, check_mark, with_newlines

STANDARD_OUTPUT = "standard output"
# Handlers of errors with which a stream may refuse a character of an answer.
REFUSING = ("strict", "surrogateescape")


class StandardOutput(io.TextIOWrapper):
    """Standard output whose errors name it, as those of files do."""

    def write(self, text: str, /) -> int:
        with _named_errors():
            return super().write(text)

    def flush(self) -> None:
        with _named_errors():
            super().flush()


@contextlib.contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = STANDARD_OUTPUT
        raise


class ClosedOutput(io.TextIOBase):
    """In place of a standard output that was closed before the program started."""

    encoding, errors = "utf-8", "backslashreplace"

    def write(self, text: str) -> int:
        raise BrokenPipeError


def prepare_streams() -> None:
    """Make the standard streams fit for any text: what an encoding does not have is shown as an escape.

    A file that is opened while a standard stream is closed would get its number, and whatever a library prints; the
    null device takes the number instead.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = ClosedOutput()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in REFUSING and not _is_lossless(stream):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdout, io.TextIOWrapper):
        plain, encoding, errors, lines = sys.stdout, sys.stdout.encoding, sys.stdout.errors, sys.stdout.line_buffering
        sys.stdout = StandardOutput(plain.detach(), encoding, errors, line_buffering=lines)


def _is_lossless(stream: io.TextIOWrapper) -> bool:
    """Whether a stream takes every character, and bytes of file names that are not UTF-8 as well."""
    return stream.errors == "surrogateescape" and _is_utf8(stream.encoding)


def _is_utf8(encoding: str | None) -> bool:
    try:
        return encoding is not None and codecs.lookup(encoding).name == "utf-8"
    except LookupError:
        return False


def print_out(text: str) -> None:
    """Print a line on standard output, in the encoding that the stream has."""
    click.echo(text, file=sys.stdout)


def print_json(value: Any, indent: int | None = None) -> None:
    """Print a value as JSON, in ASCII alone where standard output is not UTF-8."""
    ascii_only = not _is_utf8(getattr(sys.stdout, "encoding", None))
    print_out(json.dumps(value, indent=indent, ensure_ascii=ascii_only))


def discard_output() -> None:
    """Let the output that is still in buffers go nowhere: writing it again at exit would only fail again."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError):  # no file behind it, as in a test
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def has_piped_input() -> bool:
    """Whether standard input comes from a file or a program, not from a person."""
    return sys.stdin is not None and not sys.stdin.closed and not sys.stdin.isatty()


def read_input() -> str:
    """All of standard input.

    Raises:
        InputError: it is not text.
        StorageError: it cannot be read.
    """
    buffer = getattr(sys.stdin, "buffer", None)
    try:
        if buffer is None:
            return sys.stdin.read()
        data = buffer.read()
        check_encoding(data, "standard input")
        return decode_input(data)
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not text in UTF-8: {error}") from None
    except OSError as error:
        raise StorageError(f"standard input cannot be read: {error.strerror or error}") from None


def decode_input(data: bytes) -> str:
    """Text of standard input, or a line of it: UTF-8, or what the terminal's own encoding makes of it.

    Raises:
        UnicodeDecodeError: neither.
        InputError: the text is in UTF-16 or UTF-32.
    """
    check_mark(data, "standard input")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return with_newlines(data.decode("utf-8"))
    except UnicodeDecodeError:
        encoding = getattr(sys.stdin, "encoding", None) or "utf-8"
        if _is_utf8(encoding):
            raise
        return with_newlines(data.decode(encoding))
