"""Progress on standard error: bars on a terminal, drawn by rich; elsewhere lines, for long operations alone."""

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

    from pos2d.progress import Unit

# Of the lines of one operation.
SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """One bar, which disappears when it is closed; a display for :func:`pos2d.progress.show_with`."""

    def __init__(self, bars: "Progress", label: str, total: int) -> None:
        self._bars = bars
        self._bars.start()
        self._task = bars.add_task(label, total=total, note="")

    def advance(self, count: int, note: str) -> None:
        self._bars.update(self._task, advance=count, note=note)

    def close(self) -> None:
        self._bars.stop()


class ProgressLines:
    """Prints a line now and then; a display for :func:`pos2d.progress.show_with`. ``clock`` returns seconds."""

    def __init__(self, label: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._label, self._total, self._clock = label, total, clock
        self._done = 0
        self._began = self._printed = clock()

    def advance(self, count: int, note: str) -> None:
        self._done += count
        now = self._clock()
        if now - self._printed < SECONDS_BETWEEN_LINES or self._done >= self._total:
            return
        self._printed = now
        left = (now - self._began) / self._done * (self._total - self._done)
        line = f"{self._label}: {self._done} of {self._total}, about {left:.0f} s left"
        print(f"{line} {note}".rstrip(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Print nothing more: what comes next says that this is done."""


def progress_display(label: str, total: int, unit: "Unit", long: bool) -> ProgressBar | ProgressLines | None:
    """Start a bar or lines; without a terminal there is only something for operations that are ``long``."""
    if sys.stderr.isatty():
        return _progress_bar(label, total, unit)
    return ProgressLines(label, total) if long else None


def _progress_bar(label: str, total: int, unit: "Unit") -> ProgressBar:
    """A bar with the number of pieces, or with bytes and their rate."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts: list[ProgressColumn] = [DownloadColumn(), TransferSpeedColumn()]
    if unit == "pieces":
        counts = [MofNCompleteColumn()]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *counts,
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return ProgressBar(Progress(*columns, console=Console(stderr=True), transient=True), label, total)
