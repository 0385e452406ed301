"""Regular expressions of an adapter's configuration: nobody knows who wrote them, so they get a second each."""

import regex

SECONDS = 1.0


def fits(pattern: str, name: str) -> "regex.Match[str] | None":
    """Whether ``pattern`` fits the start of a module's name; raises as :func:`fits_whole`."""
    return _timed(pattern, name, whole=False)


def fits_whole(pattern: str, name: str) -> bool:
    """Whether ``pattern`` fits all of a module's name.

    Raises:
        TimeoutError: an expression that takes for ever.
    """
    return _timed(pattern, name, whole=True) is not None


def fault_of(pattern: str) -> str | None:
    """Why ``pattern`` is not a regular expression, or None where it is one."""
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
