"""The place that the option ``cache_context`` names."""

import os
from pathlib import Path

from pos2d.errors import UsageError

SUFFIX = ".safetensors"


def names_one_file(place: Path) -> bool:
    """Whether a place is that of one context."""
    return place.suffix == SUFFIX and not place.is_dir()


def check_place(place: Path) -> None:
    """Check a place before anything is loaded.

    Raises:
        UsageError: a directory is meant, and something else is there.
    """
    if not names_one_file(place) and os.path.lexists(place) and not place.is_dir():
        raise UsageError(
            f"`cache_context` {place} is no directory, and no file whose name ends in {SUFFIX}; name another one"
        )
