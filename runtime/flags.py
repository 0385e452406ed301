"""The keywords of a verb, parted among those who heed them."""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

T = TypeVar("T")


def part_of(kind: type[T], flags: Mapping[str, Any]) -> T:
    """Those of ``flags`` that the typed dictionary ``kind`` has."""
    return cast(T, {name: flags[name] for name in kind.__annotations__ if name in flags})
