"""The outermost guard: counts requests, refuses them while the server closes, and lets no error through."""

import os
import sys
import time
import traceback

from pos2d.runtime.http.lifecycle import Lifecycle
from pos2d.runtime.http.metrics import Metrics
from pos2d.runtime.http.refusals import DEFECT, App, Message, Receive, RefusedError, Scope, Send, send_refusal

# Paths that are answered while the server closes, and that its end does not wait for.
PROBES = ("/health", "/ready", "/metrics")


def log(line: str) -> None:
    """One line on standard error; control characters, which a path may have, are escaped."""
    print(line.encode("unicode_escape").decode(), file=sys.stderr, flush=True)


class Boundary:
    """Between the server and everything else: what a request raises ends here, as an answer and one line of the log.

    The line names the place of the error and not its message, which may quote a prompt.
    """

    def __init__(self, app: App, lifecycle: Lifecycle, metrics: Metrics, *, access_log: bool) -> None:
        self._app = app
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)  # the start and the end of the application itself
            return
        started, status = time.monotonic(), 0

        async def noticed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        counted = scope["path"] not in PROBES
        self._lifecycle.active += counted
        try:
            await self._admit(scope, receive, noticed, counted)
        except Exception as error:
            log(f"error: {scope['method']} {scope['path']}: {place_of(error)}")
            if os.environ.get("POS2D_TRACEBACK"):
                traceback.print_exception(error)
            if status:
                raise UnfinishedError from None  # the server closes the connection, so that nobody takes it for the end
            await send_refusal(noticed, RefusedError(500, DEFECT), close=True)
        finally:
            self._lifecycle.active -= counted
            self._metrics.answered(status)
            if self._access_log:
                log(f"{scope['method']} {scope['path']} {status or '-'} {time.monotonic() - started:.3f} s")

    async def _admit(self, scope: Scope, receive: Receive, send: Send, counted: bool) -> None:
        if counted and self._lifecycle.is_closing:
            refusal = RefusedError(503, "the server is closing", retry_after=self._lifecycle.seconds_left + 1)
            await send_refusal(send, refusal, close=True)
            return
        await self._app(scope, receive, send)


class UnfinishedError(Exception):
    """An answer that ended with an error after it had begun, which is in the log already."""


def place_of(error: BaseException) -> str:
    """The type of an error, and the line of ours or of a library that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"
