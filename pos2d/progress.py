"""A progress bar on standard error, and nothing at all where that is not a terminal."""

import sys
from types import TracebackType
from typing import Literal


class Progress:
    """Counts ``total`` pieces of work, or bytes with their rate, under a label; threads may share it. rich draws it."""

    def __init__(self, label: str, total: int, unit: Literal["pieces", "bytes"] = "pieces") -> None:
        self._label, self._total = label, total
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                MofNCompleteColumn,
                ProgressColumn,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )
            from rich.progress import Progress as Bar

            counts: list[ProgressColumn] = [DownloadColumn(), TransferSpeedColumn()]
            if unit == "pieces":
                counts = [MofNCompleteColumn()]
            rest = (TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
            columns = (TextColumn("{task.description}"), BarColumn(), *counts, *rest)
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total, note="")
        return self

    def advance(self, count: int = 1, note: str = "") -> None:
        """So many more are done; ``note`` is shown beside them."""
        if self._bar is not None:
            self._bar.update(self._task, advance=count, note=note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
