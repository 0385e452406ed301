"""Writes shards through to the disk on a thread of its own, while other threads compute the next ones."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from pos2d.sources.files.tensor_io import forget_cached


class BackgroundFsync:
    """One thread that runs fsync for open files; an error is raised by the next :meth:`wait`.

    With ``forget``, the system's cache drops what is on the disk.
    """

    def __init__(self, forget: bool = False) -> None:
        self._forget = forget
        self._thread = ThreadPoolExecutor(1)
        self._pending: list[Future[None]] = []

    def __enter__(self) -> "BackgroundFsync":
        return self

    def start(self, descriptor: int) -> None:
        """Start an fsync of what an open file has so far, unless an earlier one is still running."""
        if all(future.done() for future in self._pending):
            self._pending.append(self._thread.submit(self._sync, descriptor))

    def finish(self, descriptor: int, then: Callable[[], None]) -> None:
        """Fsync a finished file and close it, then call ``then``, all on the thread."""

        def work() -> None:
            try:
                self._sync(descriptor)
            finally:
                os.close(descriptor)
            then()

        self._pending.append(self._thread.submit(work))

    def close(self, descriptor: int) -> None:
        """Close a file that is given up, once no fsync uses it any more."""
        self._thread.submit(os.close, descriptor)

    def wait(self) -> None:
        """Wait until everything that was submitted is done.

        Raises:
            OSError: the disk is full or failing.
        """
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()

    def _sync(self, descriptor: int) -> None:
        os.fsync(descriptor)
        if self._forget:
            forget_cached(descriptor, 0, 0)
