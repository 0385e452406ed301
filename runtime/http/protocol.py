"""The connection of one client: uvicorn's, with limits for clients that are slow on purpose."""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from pos2d.runtime.http.refusals import RefusedError

_BODY = json.dumps(RefusedError(503, "too many connections are open", retry_after=1).content).encode()
BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
)
LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class GuardedConnection(H11Protocol):
    """Closes a connection whose request does not arrive, or whose answer is not read; the request is cancelled.

    :func:`connection_class` sets the limits.
    """

    max_connections = 256
    header_timeout = 10.0
    write_timeout = 30.0

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        is_full = len(self.connections) >= self.max_connections
        super().connection_made(transport)
        if is_full:
            transport.write(BUSY)
            self._close()
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._write_timer, self._end_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_answering():
            self._stop_awaiting()
        elif self._head_timer is None and self.timeout_keep_alive_task is None:
            self._await_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_later()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._abort_later()

    def timeout_keep_alive_handler(self) -> None:
        if not self._is_answering():  # a second request may have been there already
            super().timeout_keep_alive_handler()
            self._abort_later()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.header_timeout, self._head_is_late)

    def _stop_awaiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self._is_answering() and not self.transport.is_closing():
            self.transport.write(LATE)
            self._close()

    def _close(self) -> None:
        self.transport.close()
        self._abort_later()

    def _abort_later(self) -> None:
        """A connection is closed once all is sent, for which a client that does not read must not have for ever."""
        self._end_timer = self._end_timer or self.loop.call_later(self.write_timeout, self.transport.abort)


def connection_class(*, max_connections: int, header_timeout: float, write_timeout: float) -> type[H11Protocol]:
    """A class of connections with these limits; the times are in seconds."""
    limits = {
        "max_connections": max_connections,
        "header_timeout": header_timeout,
        "write_timeout": write_timeout,
    }
    return type("Connection", (GuardedConnection,), limits)
