"""Brings shards to the disk behind the threads that write them, so that neither waits for the other."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from pos2d.exporter.files.tensor_io import forget_cached


class Settler:
    """One thread that takes orders in turn; an order that failed raises at the next :meth:`wait`.

    With ``forget`` the system's cache does not keep what is on the disk.
    """

    def __init__(self, forget: bool = False) -> None:
        self._forget = forget
        self._thread = ThreadPoolExecutor(1)
        self._orders: list[Future[None]] = []

    def __enter__(self) -> "Settler":
        return self

    def flush(self, descriptor: int) -> None:
        """Start to bring to the disk what an open file has; nothing where the last order is not done yet."""
        if all(order.done() for order in self._orders):
            self._orders.append(self._thread.submit(self._sync, descriptor))

    def settle(self, descriptor: int, then: Callable[[], None]) -> None:
        """Bring a finished file to the disk and close it; ``then`` is called when it is safely there."""

        def work() -> None:
            try:
                self._sync(descriptor)
            finally:
                os.close(descriptor)
            then()

        self._orders.append(self._thread.submit(work))

    def _sync(self, descriptor: int) -> None:
        os.fsync(descriptor)
        if self._forget:
            forget_cached(descriptor, 0, 0)

    def abandon(self, descriptor: int) -> None:
        """Close a file that nobody wants any more."""
        self._thread.submit(os.close, descriptor)

    def wait(self) -> None:
        """Until every order is carried out.

        Raises:
            OSError: the disk is full or failing.
        """
        orders, self._orders = self._orders, []
        for order in orders:
            order.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
