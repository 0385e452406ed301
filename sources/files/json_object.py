"""Reads JSON objects from files that other programs wrote, and writes our own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pos2d.errors import InputError
from pos2d.git_lfs import refuse_pointer
from pos2d.text_files import read_text

# Far above what any settings need, and far below what Python can write again.
MAX_DEPTH = 100


def read_json_object(path: Path, cure: str) -> dict[str, Any]:
    """Read the JSON object in ``path``; a byte order mark is skipped.

    Raises:
        InputError: not readable, not JSON, not an object, nested too deep or with half a character in a text; ``cure``
            ends the sentence. Or the file is a Git LFS pointer.
    """
    refuse_pointer(path)
    try:
        content = json.loads(read_text(path))
        fault = _fault(content)
    except (ValueError, OSError, RecursionError, InputError) as error:
        raise InputError(f"{path} cannot be read: {error}; {cure}") from None
    if fault is not None:
        raise InputError(f"{path} {fault}; {cure}")
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object; {cure}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with sorted keys and a final newline, so that equal contents are equal bytes."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _fault(content: Any) -> str | None:
    """Why the content could not be written again, or None."""
    values = [content]
    for _ in range(MAX_DEPTH):
        texts = [value for value in values if isinstance(value, str)]
        objects = [value for value in values if isinstance(value, dict)]
        texts += [key for value in objects for key in value]
        if any("\ud800" <= letter <= "\udfff" for text in texts if not text.isascii() for letter in text):
            return "has half of a surrogate pair in a text"
        values = [part for value in values if isinstance(value, list) for part in value]
        values += [part for value in objects for part in value.values()]
        if not values:
            return None
    return f"is nested more than {MAX_DEPTH} levels deep"
