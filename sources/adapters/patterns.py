"""Matching of untrusted regular expressions from an adapter's configuration, each within a time limit."""

import regex

SECONDS = 1.0


def match_start(pattern: str, name: str) -> "regex.Match[str] | None":
    """The match of ``pattern`` at the start of a module's name; raises as :func:`matches_whole`."""
    return _timed(pattern, name, whole=False)


def matches_whole(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches the whole of a module's name.

    Raises:
        TimeoutError: matching takes more than :data:`SECONDS`.
    """
    return _timed(pattern, name, whole=True) is not None


def pattern_error(pattern: str) -> str | None:
    """Why ``pattern`` is not a regular expression; None if it is one."""
    try:
        regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError, ValueError) as error:
        return str(error)
    return None


def _timed(pattern: str, name: str, whole: bool) -> "regex.Match[str] | None":
    try:
        return (regex.fullmatch if whole else regex.match)(pattern, name, timeout=SECONDS)
    except TimeoutError:
        raise TimeoutError(
            f"the regular expression {pattern!r} takes too long on {name}; name the modules instead"
        ) from None
