"""Recognises the small text files that a clone without git-lfs has in place of large files."""

from pathlib import Path

from pos2d.errors import InputError

POINTER = b"version https://git-lfs.github.com/spec/"
# Some software marks texts with it.
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def is_pointer(path: Path) -> bool:
    """Whether the file ``path`` is a pointer; raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return file.read(len(BYTE_ORDER_MARK) + len(POINTER)).removeprefix(BYTE_ORDER_MARK).startswith(POINTER)


def refuse_pointer(path: Path) -> None:
    """Check that ``path`` is not a pointer; a file that is missing or unreadable is left to its reader.

    Raises:
        InputError: it is one.
    """
    try:
        found = is_pointer(path)
    except OSError:
        return
    if found:
        raise InputError(
            f"{path} is a Git LFS pointer, a text in place of the file itself; run `git lfs pull` in its repository, "
            "or download the file"
        )
