"""Responses that end when the client goes away: streams of events, and answers that are sent at once."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pos2d.runtime.http.answers import RunningAnswer
from pos2d.runtime.http.boundary import log, place_of
from pos2d.runtime.http.choices import sse
from pos2d.runtime.http.errors import refusal

DONE = b"data: [DONE]\n\n"
GONE = 499  # nginx's status for a client that left; nobody reads it
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Chunks(Protocol):
    """Writes the events of an answer in the form of one route."""

    def first(self) -> bytes:
        """What a stream begins with."""

    def step(self, events: Any) -> bytes:
        """The events of one step."""

    def last(self) -> bytes:
        """What a stream ends with."""


async def streamed(answer: RunningAnswer, chunks: Chunks) -> AsyncGenerator[bytes, None]:
    """The bytes of a stream, one item for each step. An error after the first byte is the last event."""
    yield chunks.first()
    try:
        async with aclosing(answer.steps()) as steps:
            async for events in steps:
                written = chunks.step(events)
                if written:
                    yield written
    except Exception as error:
        refused = refusal(error)
        if refused.status == 500:
            log(f"error: {place_of(error)}")
        yield sse(refused.content)
    else:
        yield chunks.last()


class EventStream(Response):
    """Server-sent events; the answer is closed when they are sent or the client leaves, whichever comes first."""

    media_type = "text/event-stream"

    def __init__(self, answer: RunningAnswer, chunks: Chunks) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._answer, self._chunks = answer, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with aclosing(streamed(self._answer, self._chunks)) as items:
                async for data in items:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await while_connected(receive, write(), self._answer.close)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Any], close: Callable[[], None]) -> Any:
    """The result of ``work``, or None if the client leaves before; ``close`` is called at once then, and always."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return None
        return task.result()
    finally:
        close()
        for waiting in (task, watcher):
            if not waiting.done():
                waiting.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await waiting


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def whole(request: Request, answer: RunningAnswer, make: Callable[[], Awaitable[bytes]]) -> Response:
    """A JSON response that ``make`` writes from the complete answer."""
    body = await while_connected(request.receive, _awaited(make), answer.close)
    return Response(status_code=GONE) if body is None else Response(body, media_type="application/json")


async def _awaited(make: Callable[[], Awaitable[bytes]]) -> bytes:
    return await make()
