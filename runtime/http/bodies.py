"""Bodies of requests, which are read whole within their limits before a route sees them, and clients that go away."""

import asyncio
import contextlib

from pos2d.runtime.http.refusals import App, Message, Receive, RefusedError, Scope, Send, header, send_refusal
from pos2d.runtime.http.request_end import one_request
from pos2d.units import size_text

# What is still read and dropped of a body that was refused: a client that writes all before it reads would otherwise
# find a closed connection in place of the answer. Bytes as a multiple of the limit, and seconds.
LINGER_SIZES, LINGER_SECONDS = 16, 2.0


class Bodies:
    """Reads the body of a request, at most ``max_bytes`` within ``timeout`` seconds, and cancels the request of a
    client that goes away."""

    def __init__(self, app: App, *, max_bytes: int, timeout: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await self._read(scope, receive)
        except RefusedError as refusal:
            await send_refusal(send, refusal, close=True)
            await self._linger(receive)
            return
        if body is not None:
            await answer(self._app, scope, body, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None where the client went away.

        Raises:
            RefusedError: the body is too large, or too slow.
        """
        too_large = RefusedError(413, f"the body of a request must be at most {size_text(self._max_bytes)}")
        length = header(scope, b"content-length") or b"0"
        if not length.isdigit() or len(length) > 18 or int(length) > self._max_bytes:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._max_bytes:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise RefusedError(408, f"the body of the request did not arrive within {self._timeout:g} s") from None

    async def _linger(self, receive: Receive) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                for _ in range(LINGER_SIZES * self._max_bytes // 65536 + 1):
                    message = await receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return


async def answer(app: App, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
    """Let ``app`` answer a request whose body was read; a client that goes away cancels it, wherever it is."""
    gone, complete = asyncio.Event(), False
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    running = asyncio.current_task()
    assert running is not None

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()
        if not complete:
            running.cancel()

    async def replay() -> Message:
        if first:
            return first.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def noticed(message: Message) -> None:
        nonlocal complete
        complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        # Sending to a client that is gone, or that reads fast, waits for nothing; an application that always has more
        # to send would never let go of the loop.
        await asyncio.sleep(0)
        await send(message)

    watcher = asyncio.create_task(watch())
    try:
        with one_request():
            await app(scope, replay, noticed)
    except asyncio.CancelledError:
        # The server's own cancelling, as at its end, goes on.
        if not gone.is_set() or complete or running.uncancel() > 0:
            raise
    finally:
        watcher.cancel()
