"""Reads values from the JSON objects that other programs wrote, such as a model's ``config.json``, with their types."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pos2d.errors import InputError

# Sizes of tensors and numbers of positions: what fits into 32 bits.
MAX_COUNT = 2**31 - 1
MAX_SHOWN = 60
MISSING: Any = object()


@dataclass(frozen=True, slots=True)
class ConfigValues:
    """The keys of one JSON object.

    ``source`` names its file in errors, and ``path`` the keys that lead to the object, such as ``rope_scaling.``.
    A method gives the value of a key, or ``default`` where the key is missing. A value that is null is an error, unless
    the default is None.

    Raises:
        InputError: by every method, for a value of another type or out of range, and for a missing key that has no
            default. The message names the file and the key.
    """

    values: Mapping[str, Any]
    source: str
    path: str = ""

    def whole(self, key: str, default: Any = MISSING, minimum: int = 0, maximum: int = MAX_COUNT) -> Any:
        """A whole number, ``minimum`` to ``maximum``."""
        value = self._get(key, default)
        if value is not default and not (is_count(value) and minimum <= value <= maximum):
            raise self.wrong(key, f"a whole number from {minimum} to {maximum}")
        return value

    def number(self, key: str, default: Any = MISSING, above: float = 0.0) -> Any:
        """A finite number above ``above``."""
        value = self._get(key, default)
        if value is not default and not (is_number(value) and value > above):
            raise self.wrong(key, f"a number above {above:g}")
        return value

    def switch(self, key: str, default: Any = MISSING) -> Any:
        """True or false."""
        value = self._get(key, default)
        if value is not default and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: Any = MISSING) -> Any:
        """A text."""
        value = self._get(key, default)
        if value is not default and not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def texts(self, key: str, default: Any = MISSING) -> Any:
        """A list of texts."""
        value = self._get(key, default)
        is_list = isinstance(value, list | tuple)
        if value is not default and not (is_list and all(isinstance(part, str) for part in value)):
            raise self.wrong(key, "a list of texts")
        return value

    def wholes(self, key: str, default: Any = MISSING) -> Any:
        """A list of whole numbers, none below 0."""
        value = self._get(key, default)
        if value is not default and not (isinstance(value, list | tuple) and all(map(is_count, value))):
            raise self.wrong(key, "a list of whole numbers")
        return value

    def numbers(self, key: str, length: int) -> Any:
        """A list of ``length`` finite numbers above 0."""
        value = self._get(key, MISSING)
        is_list = isinstance(value, list | tuple) and len(value) == length
        if not (is_list and all(is_number(part) and part > 0 for part in value)):
            raise self.wrong(key, f"a list of {length} numbers above 0")
        return value

    def block(self, key: str) -> "ConfigValues":
        """An object; one without keys where it is missing or null."""
        value = self._get(key, None)
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(key, "a JSON object")
        return ConfigValues(value or {}, self.source, f"{self.path}{key}.")

    def has(self, key: str) -> bool:
        """Whether the key exists with a value other than null."""
        return self.values.get(key) is not None

    def wrong(self, key: str, wanted: str) -> InputError:
        """The error for the value of ``key``; ``wanted`` says what belongs there."""
        found = f"is {shown(self.values[key])}" if key in self.values else "is missing"
        return InputError(f"{self.source}: {self.path}{key} {found}, it must be {wanted}; correct it there")

    def _get(self, key: str, default: Any) -> Any:
        if key not in self.values and default is MISSING:
            raise InputError(f"{self.source}: {self.path}{key} is missing; copy the file again")
        return self.values.get(key, default)


def is_count(value: object) -> bool:
    """Whether a value is a whole number from 0 to what 32 bits hold."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def is_number(value: object) -> bool:
    """Whether a value is a finite number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def shown(value: object) -> str:
    """A value for a message: in one line, short, and null as JSON has it."""
    if value is None:
        return "null"
    try:
        text = repr(value)
    except ValueError:  # Python writes no numbers of more than some thousand digits
        text = "a number of thousands of digits"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
