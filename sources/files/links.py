"""Recognises links to files that are missing, such as those of a Hub snapshot that was copied without its blobs."""

from pathlib import Path

from pos2d.errors import InputError


def refuse_broken_link(path: Path) -> None:
    """Check that ``path`` is not a link to something that is missing; a path where nothing is passes.

    Raises:
        InputError: it is one.
    """
    if path.is_symlink() and not path.exists():
        raise InputError(
            f"{path} is a link to a file that is missing; download it again, or copy the directory with the files that "
            "its links lead to (cp -rL)"
        )
