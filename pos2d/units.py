"""Sizes as people write them, in bytes: ``8GB``, ``500MB``, ``12GiB``, ``8e9``."""

import re

from pos2d.errors import UsageError

UNITS = {"": 1, "b": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("kmgt", 1)
    for ending, base in (("b", 1000), ("ib", 1024))
}


def parse_size(text: str | int, flag: str) -> int:
    """A size in bytes; ``flag`` names it in errors. ``GB`` is 1e9 bytes, ``GiB`` 1024**3, no unit means bytes.

    Raises:
        UsageError: not a number with such a unit, or less than one byte.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)\s*([a-z]*)", str(text).strip().lower())
    if found is None or found[2] not in UNITS or float(found[1]) * UNITS[found[2]] < 1:
        raise UsageError(f"{flag} {text!r} cannot be read; give a size such as 8GB, 500MB or 12GiB")
    return int(float(found[1]) * UNITS[found[2]])


def size_text(count: int) -> str:
    """Three digits or so and a unit of 1000: ``988 MB``, ``1.54 GB``."""
    if count < 1000:
        return f"{count} B"
    for unit, scale in (("kB", 1e3), ("MB", 1e6)):
        if count < 999.5 * scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e9:.2f} GB"
