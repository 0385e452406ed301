"""What is to be done once a request has ended, however it ended."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Action = Callable[[], None]
_ACTIONS: ContextVar[list[Action] | None] = ContextVar("actions", default=None)


@contextmanager
def one_request() -> Iterator[None]:
    """The time of one request: at its end, everything that was registered inside is called, the newest first."""
    actions: list[Action] = []
    token = _ACTIONS.set(actions)
    try:
        yield
    finally:
        _ACTIONS.reset(token)
        for action in reversed(actions):
            action()


def at_request_end(action: Action) -> None:
    """Call ``action`` when the request has ended that is answered here, if one is."""
    actions = _ACTIONS.get()
    if actions is not None:
        actions.append(action)
