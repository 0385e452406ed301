"""Sizes in bytes, as people write them: ``8GB``, ``500MB``, ``12GiB``, ``8e9``."""

import re

from pos2d.errors import UsageError

UNITS = {"": 1, "b": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("kmgt", 1)
    for ending, base in (("b", 1000), ("ib", 1024))
}


def parse_size(text: str | int, name: str) -> int:
    """Parse a size to bytes; errors name the parameter ``name``. ``GB`` is 1e9 bytes, ``GiB`` 1024**3, no unit bytes.

    Raises:
        UsageError: ``text`` is not a number with such a unit, or is less than one byte.
    """
    parsed = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)\s*([a-z]*)", str(text).strip().lower())
    if parsed is None or parsed[2] not in UNITS or float(parsed[1]) * UNITS[parsed[2]] < 1:
        raise UsageError(f"`{name}` {text!r} cannot be read; give a size such as 8GB, 500MB or 12GiB")
    return int(float(parsed[1]) * UNITS[parsed[2]])


def size_text(count: int) -> str:
    """Format a number of bytes with about three digits: ``988 MB``, ``1.54 GB``."""
    if count < 1000:
        return f"{count} B"
    for unit, scale in (("kB", 1e3), ("MB", 1e6)):
        if count < 999.5 * scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e9:.2f} GB"
