"""Reads JSON objects from files that other programs wrote."""

import json
from pathlib import Path
from typing import Any

from pos2d.errors import InputError


def read_json_object(path: Path, cure: str) -> dict[str, Any]:
    """Read the JSON object in ``path``.

    Raises:
        InputError: not readable, not JSON, or not an object; ``cure`` ends the sentence.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}; {cure}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object; {cure}")
    return content
