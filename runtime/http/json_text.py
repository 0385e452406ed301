"""JSON of answers in UTF-8, which people read in a terminal."""

import json
from typing import Any

from pos2d.text_files import LINE_SEPARATORS

# Some readers of event streams end a line there, too.
LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in LINE_SEPARATORS}


def json_text(value: Any) -> str:
    """A value as JSON, with characters as themselves."""
    return json.dumps(value, ensure_ascii=False).translate(LINE_ENDS)


def json_bytes(text: str) -> bytes:
    """JSON in UTF-8; a lone surrogate, which UTF-8 does not have, becomes its escape."""
    return text.encode("utf-8", "backslashreplace")
