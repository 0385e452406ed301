"""The input of a batch: raw lines of a file or of standard input, read twice in windows of fixed size."""

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pos2d.errors import InputError
from pos2d.text_files import LONGEST_MARK, check_encoding

# Lines are decoded together within such a window and nowhere else, so that a run that was interrupted computes the
# remaining lines exactly as it would have.
WINDOW = 64
# In files with these names a line that is not JSON is an error; in others it is a prompt.
JSON_SUFFIXES = (".jsonl", ".json")


STANDARD_INPUT = "-"


@contextlib.contextmanager
def input_file(name: str | Path) -> Iterator[Path]:
    """The file with the lines; ``-`` is a copy of standard input, since the lines are read twice.

    Raises:
        InputError: standard input is closed or cannot be read.
        StorageError: the copy cannot be written.
    """
    if str(name) != STANDARD_INPUT:
        yield Path(name)
        return
    if sys.stdin is None:
        raise InputError("standard input is closed; `input='-'` reads it")
    with tempfile.TemporaryDirectory(prefix="pos2d-") as directory:
        path = Path(directory) / "standard input"
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        if path.stat().st_size == 0:
            raise InputError("standard input is empty; it must have a line for every question")
        yield path


def count_lines(path: Path, name: str) -> int:
    """Number of lines of a file, which errors call ``name``.

    Raises:
        InputError: it is not a regular file, cannot be read, is empty, or is not in UTF-8.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{name} is not a regular file, and it must be read twice; write the lines to a file")
    try:
        with path.open("rb") as file:
            check_encoding(file.read(LONGEST_MARK), name)
            file.seek(0)
            count = sum(1 for _ in file)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from None
    if count == 0:
        raise InputError(f"{name} is empty; it must have a line for every question")
    return count


def windows(path: Path, done: int) -> Iterator[list[tuple[int, bytes]]]:
    """Windows of lines with their numbers, from the window that has the first line after ``done``."""
    with path.open("rb") as file:
        numbered = enumerate(file, 1)
        for _ in islice(numbered, done - done % WINDOW):
            pass
        while window := list(islice(numbered, WINDOW)):
            if window[-1][0] > done:
                yield window
