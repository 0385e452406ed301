"""The life of the server: it admits requests, then finishes those that it has, then ends."""

import time
from collections.abc import Callable


class Lifecycle:
    """What phase the server is in, and how many requests it answers now.

    From :meth:`close` on, no request is admitted, and those that run have ``grace`` seconds; after that, what was
    registered with :meth:`at_end` is called. All methods belong to the thread of the event loop.
    """

    def __init__(self, grace: float) -> None:
        self.active = 0
        self._grace = grace
        self._ends_at: float | None = None
        self._actions: set[Callable[[], None]] = set()

    @property
    def is_closing(self) -> bool:
        return self._ends_at is not None

    @property
    def seconds_left(self) -> float:
        """The rest of the grace; all of it before the server closes."""
        return self._grace if self._ends_at is None else max(0.0, self._ends_at - time.monotonic())

    def close(self) -> None:
        """Stop admitting."""
        self._ends_at = self._ends_at or time.monotonic() + self._grace

    def at_end(self, action: Callable[[], None]) -> Callable[[], None]:
        """Call ``action`` when the grace is over; the function that is returned takes it back."""
        self._actions.add(action)
        return lambda: self._actions.discard(action)

    def end(self) -> None:
        """Call what was registered."""
        for action in list(self._actions):
            action()
