"""The place that the option ``cache_context`` names."""

import os
from collections.abc import Collection
from pathlib import Path

from pos2d.errors import UsageError

SUFFIX = ".safetensors"


def names_one_file(place: Path) -> bool:
    """Whether a place is that of one context."""
    return place.suffix == SUFFIX and not place.is_dir()


def check_contexts(cache_context: str | None, contexts: Collection[str | None]) -> None:
    """Check the option before anything is loaded; ``contexts`` are those of all prompts.

    Raises:
        UsageError: there is no context, there are several for one file, or something else is in its place.
    """
    if cache_context is None:
        return
    place, given = Path(cache_context), set(contexts) - {None}
    if not given:
        raise UsageError("`cache_context` stores a `context`, and there is none; give one, or leave it out")
    if len(given) > 1 and names_one_file(place):
        raise UsageError(f"`cache_context` {place} is one file, and there are several contexts; name a directory")
    check_place(place)


def check_place(place: Path) -> None:
    """Check a place before anything is loaded.

    Raises:
        UsageError: a directory is meant, and something else is there.
    """
    if not names_one_file(place) and os.path.lexists(place) and not place.is_dir():
        raise UsageError(
            f"`cache_context` {place} is no directory, and no file whose name ends in {SUFFIX}; name another one"
        )
