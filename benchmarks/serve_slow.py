"""Clients that send or read a byte now and then."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

from http_load import HOST, Request

PAUSE = 0.5


class SlowClients:
    """A third drips its headers, a third its body, and a third reads its answer a byte at a time.

    One that the server cuts off connects again, but a reader does not ask again, since answers are work that a server
    owes anybody.
    """

    def __init__(self, port: int, count: int, request: Request) -> None:
        self.connected = 0
        self._port = port
        self._count = count
        self._head, _, self._body = request.encode().partition(b"\r\n\r\n")

    async def run(self) -> None:
        """Go on until cancelled."""
        kinds = (self._drip_headers, self._drip_body, self._read_slowly)
        async with asyncio.TaskGroup() as group:
            for number in range(self._count):
                group.create_task(self._again(kinds[number % 3]))

    async def _again(self, kind: Callable[[socket.socket], Awaitable[None]]) -> None:
        while True:
            with contextlib.suppress(OSError), socket.socket() as connection:
                connection.setblocking(False)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
                await asyncio.get_running_loop().sock_connect(connection, (HOST, self._port))
                self.connected += 1
                try:
                    await kind(connection)
                finally:
                    self.connected -= 1
            await asyncio.sleep(PAUSE)

    async def _drip_headers(self, connection: socket.socket) -> None:
        await self._drip(connection, self._head)

    async def _drip_body(self, connection: socket.socket) -> None:
        await asyncio.get_running_loop().sock_sendall(connection, self._head + b"\r\n\r\n")
        await self._drip(connection, self._body)

    async def _drip(self, connection: socket.socket, data: bytes) -> None:
        """Send a byte a pause, the last one never; ends when the server closes the connection."""
        loop = asyncio.get_running_loop()
        for byte in data[:-1]:
            await loop.sock_sendall(connection, bytes([byte]))
            try:
                async with asyncio.timeout(PAUSE):
                    if not await loop.sock_recv(connection, 4096):
                        return
            except TimeoutError:
                continue

    async def _read_slowly(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(connection, self._head + b"\r\n\r\n" + self._body)
        while await loop.sock_recv(connection, 1):
            await asyncio.sleep(PAUSE)
        await asyncio.Event().wait()
