"""The input file of a batch: raw lines, read twice in windows of fixed size."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pos2d.errors import InputError

# Lines are grouped into sequences within such a window and nowhere else, so that a run that was interrupted computes
# the remaining lines exactly as it would have.
WINDOW = 64
# In files with these names a line that is not JSON is an error; in others it is a prompt.
JSON_SUFFIXES = (".jsonl", ".json")


def count_lines(path: Path) -> int:
    """Number of lines of a file.

    Raises:
        InputError: it is not a regular file, cannot be read, or is empty.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a regular file, and it must be read twice; write the lines to a file")
    try:
        with path.open("rb") as file:
            count = sum(1 for _ in file)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if count == 0:
        raise InputError(f"{path} is empty; it must have a line for every question")
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
