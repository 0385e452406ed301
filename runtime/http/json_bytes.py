"""JSON of answers in UTF-8, which people read in a terminal."""


def json_bytes(text: str) -> bytes:
    """JSON in UTF-8; a lone surrogate, which UTF-8 does not have, becomes its escape."""
    return text.encode("utf-8", "backslashreplace")
