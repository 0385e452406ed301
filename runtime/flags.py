"""The keywords of a verb, parted among those who heed them."""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from pos2d.errors import UsageError

T = TypeVar("T")


def part_of(kind: type[T], flags: Mapping[str, Any]) -> T:
    """Those of ``flags`` that the typed dictionary ``kind`` has."""
    return cast(T, {name: flags[name] for name in kind.__annotations__ if name in flags})


def check_known(kind: type[Any], flags: Mapping[str, Any]) -> None:
    """Raises:
    UsageError: a keyword that the typed dictionary ``kind`` does not have.
    """
    unknown = sorted(set(flags) - set(kind.__annotations__))
    if unknown:
        raise UsageError(f"{', '.join(unknown)} is no option; there are {', '.join(sorted(kind.__annotations__))}")
