"""Runs uvicorn with the limits of connections, and ends it: what is being answered is finished first."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from pos2d.runtime.http.boundary import UnfinishedError, log, place_of
from pos2d.runtime.http.lifecycle import Lifecycle
from pos2d.runtime.http.listening import listen
from pos2d.runtime.http.protocol import connection_class
from pos2d.runtime.http.refusals import App
from pos2d.runtime.http.shell import Services

BACKLOG = 512
MAX_HEAD_BYTES = 16 * 1024
KEEP_ALIVE_SECONDS = 15
# What requests that are stopped at the end of the grace get to say so.
LAST_SECONDS = 2
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Server(uvicorn.Server):
    """A server that follows ``lifecycle``; its signals are those of :func:`ending_signals`."""

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._lifecycle = lifecycle
        self._on_start = on_start
        self._stopped_at: float | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    async def on_tick(self, counter: int) -> bool:
        lifecycle = self._lifecycle
        if lifecycle.is_closing:
            if lifecycle.active == 0:
                self.should_exit = True
            elif self._stopped_at is not None:
                self.should_exit |= time.monotonic() > self._stopped_at + LAST_SECONDS
            elif lifecycle.seconds_left == 0:
                self._stopped_at = time.monotonic()
                lifecycle.end()
        return await super().on_tick(counter)


def run_server(
    app: App, bound: socket.socket, services: Services, on_start: Callable[[], None], on_abort: Callable[[], None]
) -> None:
    """Serve ``app`` on a bound socket until a signal ends it, or ``services.lifecycle`` is closed.

    ``on_start`` is called once clients are answered, and ``on_abort`` where a second signal ends the process at once.

    Raises:
        OutputError: another program listens there.
        InputError: the tokenizer cannot be read.
    """
    options = services.options
    connections = connection_class(
        max_connections=options.max_connections,
        header_timeout=options.header_timeout,
        write_timeout=options.write_timeout,
    )
    config = uvicorn.Config(
        app,
        http=connections,
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_SECONDS,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )
    server = Server(config, services.lifecycle, on_start)

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(log_failure)
        try:
            if services.has_template:
                await services.templates.start()
            listen(bound, BACKLOG)
            await server.serve(sockets=[bound])
        finally:
            await services.templates.close()

    with ending_signals(services.lifecycle, on_abort), one_line_logs():
        asyncio.run(run())


@contextlib.contextmanager
def ending_signals(lifecycle: Lifecycle, on_abort: Callable[[], None]) -> Iterator[None]:
    """Close on the first signal inside the block, and end the process at once on the second."""

    def end(number: int, _frame: Any) -> None:
        if lifecycle.is_closing:
            on_abort()
            os._exit(128 + number)
        lifecycle.close()

    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield
        return
    before = {}
    for name in SIGNALS:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class OneLine(logging.Handler):
    """Logs where an error happened, in one line and without its message, which may quote a prompt."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, UnfinishedError | asyncio.CancelledError):
            return
        log(f"error: {record.name}: {record.getMessage().strip() if error is None else place_of(error)}")


@contextlib.contextmanager
def one_line_logs() -> Iterator[None]:
    """Log the errors of uvicorn and asyncio in one line each; what clients do wrong is no error."""
    loggers = [logging.getLogger(name) for name in ("uvicorn", "asyncio")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    handler = OneLine()
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.ERROR)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def log_failure(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what nobody handles, such as an exception of a task that nobody waits for."""
    error = context.get("exception")
    log(f"error: {context['message'] if error is None else place_of(error)}")
