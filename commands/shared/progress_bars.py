"""Progress bars on standard error, drawn by rich; there are none where standard error is not a terminal."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

    from pos2d.progress import Unit


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


def progress_bar(label: str, total: int, unit: "Unit") -> ProgressBar | None:
    """Start a bar, with the number of pieces or with bytes and their rate; None without a terminal."""
    if not sys.stderr.isatty():
        return None
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
