"""Progress of long operations. Nothing is shown unless a program installs a display with :func:`show_with`."""

from collections.abc import Callable
from types import TracebackType
from typing import Literal, Protocol

Unit = Literal["pieces", "bytes"]


class Display(Protocol):
    """Shows the progress of one operation."""

    def advance(self, count: int, note: str) -> None:
        """Count ``count`` more units as done and show ``note`` after the bar. Several threads may call this."""

    def close(self) -> None:
        """Stop showing the operation."""


# Starts to show an operation with this label, total and unit, and whether it is long; None where it is not shown.
DisplayFactory = Callable[[str, int, Unit, bool], Display | None]
_factory: DisplayFactory | None = None


def show_with(factory: DisplayFactory | None) -> None:
    """Show every operation that begins from now on with a display that ``factory`` makes; None shows nothing."""
    global _factory
    _factory = factory


class Progress:
    """Counts how much of ``total`` an operation has done; ``unit`` says whether items or bytes are counted.

    ``long``: it often takes most of a minute, so that it is to be shown where there is no terminal, too.
    A context manager: the operation is shown from entry to exit. Several threads may share it.
    """

    def __init__(self, label: str, total: int, unit: Unit = "pieces", *, long: bool = False) -> None:
        self._operation = (label, total, unit, long)
        self._display: Display | None = None

    def __enter__(self) -> "Progress":
        if _factory is not None:
            self._display = _factory(*self._operation)
        return self

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count ``count`` more units as done; ``note`` is shown after the bar."""
        if self._display is not None:
            self._display.advance(count, note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.close()
            self._display = None
