"""A guarded application of a few routes on a real server, and sockets that talk to it as badly as they like."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2

from pos2d.runtime.http.listening import bind, url_of
from pos2d.runtime.http.options import ServeOptions
from pos2d.runtime.http.refusals import App, Receive, Scope, Send, send_body
from pos2d.runtime.http.server import run_server
from pos2d.runtime.http.shell import Services, guarded
from pos2d.runtime.serving.engine import Engine

SECRET = "what nobody may read in a log"
CHUNK = 32 * 1024


@dataclass
class Toy:
    """An application that notes what happens to it.

    ``/echo`` answers with the length of the body, ``/wait`` after ``release``, ``/stream`` with chunks until it is
    cancelled, and ``/crash`` and ``/break`` raise an error, the second one after its answer has begun.
    """

    release: threading.Event = field(default_factory=threading.Event)
    waiting: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    chunks: int = 0
    bodies: list[int] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        body = (await receive())["body"]
        self.bodies.append(len(body))
        try:
            await self._answer(scope["path"], send, body)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _answer(self, path: str, send: Send, body: bytes) -> None:
        if path == "/crash":
            raise ValueError(SECRET)
        if path.startswith("/echo"):
            await send_body(send, 200, str(len(body)).encode(), "text/plain")
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun ", "more_body": True})
        self.waiting.set()
        if path == "/break":
            raise ValueError(SECRET)
        while path == "/stream":
            await send({"type": "http.response.body", "body": bytes(CHUNK), "more_body": True})
            self.chunks += 1
        while not self.release.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": b"done"})


@dataclass(frozen=True)
class Running:
    """A server in a thread."""

    url: str
    toy: Toy
    services: Services
    thread: threading.Thread

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.url.rpartition(":")[2])

    def request(self, path: str, method: str = "GET", **settings: Any) -> httpx2.Response:
        return httpx2.request(method, self.url + path, timeout=5, verify=False, **settings)  # reads no certificates

    def talk(self, data: bytes, seconds: float = 5) -> bytes:
        """All that the server answers to these bytes, until it closes the connection."""
        with socket.create_connection(self.address, timeout=seconds) as connection:
            connection.sendall(data)
            return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    """Read until the other side closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def until(condition: Callable[[], Any], seconds: float = 5) -> None:
    """Wait for a condition.

    Raises:
        AssertionError: it does not come true.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@contextlib.contextmanager
def serving(engine: Engine, **options: Any) -> Iterator[Running]:
    """The toy behind all guards, with a grace of a second at the end."""
    services = replace(services_of(engine, **options), has_template=False)
    toy = Toy()
    with listening(toy, engine, services) as (url, thread):
        try:
            yield Running(url, toy, services, thread)
        finally:
            toy.release.set()


def services_of(engine: Engine, **options: Any) -> Services:
    """The services of a server with these options."""
    return Services.of(engine, ServeOptions(**{"port": 0, "grace": 1.0, **options}))


@contextlib.contextmanager
def listening(app: App, engine: Engine, services: Services) -> Iterator[tuple[str, threading.Thread]]:
    """``app`` behind all guards, on a free port and in a thread; its address."""
    started = threading.Event()
    shell = guarded(app, engine, services)
    with bind(services.options.host, 0) as bound:
        url = url_of(bound)
        thread = threading.Thread(target=run_server, args=(shell, bound, services, started.set, lambda: None))
        thread.start()
        try:
            assert started.wait(30)
            yield url, thread
        finally:
            services.lifecycle.close()
            thread.join(10)
            assert not thread.is_alive()
