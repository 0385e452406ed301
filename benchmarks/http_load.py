"""Sends HTTP requests over loopback and notes when every piece of an answer comes; nothing is parsed meanwhile.

A request takes a connection of its own. What came is parsed when the load is over, so that the load generator takes
little of the cores that the server runs on.
"""

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Request:
    """A POST request with a JSON body."""

    path: str
    body: dict[str, Any]

    def encode(self, api_key: str | None = None) -> bytes:
        content = json.dumps(self.body).encode()
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n{key}"
            f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + content


@dataclass(frozen=True, eq=False)
class Answer:
    """What came for a request; times are of :func:`time.perf_counter`, in seconds.

    ``pieces`` are the bytes with the time at which they came. ``error`` says why there is no whole answer.
    """

    request: Request
    sent: float
    ended: float
    pieces: Sequence[tuple[float, bytes]]
    error: str | None = None

    @cached_property
    def _parts(self) -> tuple[int, dict[str, str], list[tuple[float, bytes]]]:
        return parse_response(self.pieces)

    @property
    def status(self) -> int:
        """The HTTP status; 0 where none came."""
        return self._parts[0]

    @property
    def headers(self) -> dict[str, str]:
        return self._parts[1]

    @cached_property
    def text(self) -> str:
        return b"".join(data for _, data in self._parts[2]).decode(errors="replace")

    @cached_property
    def events(self) -> list[tuple[float, dict[str, Any]]]:
        """Server-sent events with the time at which each was complete, without the last, ``[DONE]``."""
        return parse_events(self._parts[2])

    @cached_property
    def is_whole(self) -> bool:
        """Whether every branch has a finish reason."""
        reasons: dict[int, Any] = {}
        for _, event in self.events:
            for choice in event.get("choices", ()):
                reasons[choice["index"]] = reasons.get(choice["index"]) or choice.get("finish_reason")
        return self.status == 200 and self.error is None and bool(reasons) and all(reasons.values())

    @cached_property
    def token_times(self) -> dict[int, list[float]]:
        """When each piece of text came, by branch."""
        times: dict[int, list[float]] = {}
        for when, event in self.events:
            for choice in event.get("choices", ()):
                if text_of(choice):
                    times.setdefault(choice["index"], []).append(when)
        return times

    @property
    def usage(self) -> dict[str, Any]:
        found = [event["usage"] for _, event in self.events if event.get("usage")]
        return dict(found[-1]) if found else {}

    @property
    def tokens(self) -> int:
        """New tokens: as the server counts them, else the number of pieces of text."""
        return int(self.usage.get("completion_tokens") or sum(map(len, self.token_times.values())))

    @property
    def texts(self) -> dict[int, str]:
        """The answers by branch."""
        found: dict[int, str] = {}
        for _, event in self.events:
            for choice in event.get("choices", ()):
                found[choice["index"]] = found.get(choice["index"], "") + text_of(choice)
        return found

    @property
    def first_token_s(self) -> float:
        return min(times[0] for times in self.token_times.values()) - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring pieces of text of a branch."""
        lists = self.token_times.values()
        return [later - earlier for times in lists for earlier, later in itertools.pairwise(times)]

    def tokens_between(self, begin: float, end: float) -> float:
        """New tokens that came in a span of time; a piece of text has its share of the tokens."""
        times = [when for list_ in self.token_times.values() for when in list_]
        inside = sum(begin <= when < end for when in times)
        return self.tokens * inside / len(times) if times else 0.0


def text_of(choice: dict[str, Any]) -> str:
    """The text of a choice, of completions or of chat completions."""
    return str(choice.get("text") or (choice.get("delta") or {}).get("content") or "")


def parse_response(pieces: Sequence[tuple[float, bytes]]) -> tuple[int, dict[str, str], list[tuple[float, bytes]]]:
    """Status, headers in lower case, and the body in pieces, each with the time at which it was complete."""
    data = b"".join(piece for _, piece in pieces)
    head, separator, body = data.partition(b"\r\n\r\n")
    if not separator:
        return 0, {}, []
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    ends: list[tuple[int, float]] = []
    position = 0
    for when, piece in pieces:
        position += len(piece)
        ends.append((position, when))
    start = len(head) + len(separator)
    if headers.get("transfer-encoding") != "chunked":
        return int(first.split()[1]), headers, [(ends[-1][1], body)]
    chunks, place, number = [], 0, 0
    while (line := body.find(b"\r\n", place)) >= 0 and (size := int(body[place:line].split(b";")[0] or b"0", 16)):
        place = line + 2 + size
        while ends[number][0] < min(start + place, position):
            number += 1
        chunks.append((ends[number][1], body[line + 2 : place]))
        place += 2
    return int(first.split()[1]), headers, chunks


def parse_events(chunks: Sequence[tuple[float, bytes]]) -> list[tuple[float, dict[str, Any]]]:
    """The JSON objects of ``data:`` lines, with the time of the chunk that completed them."""
    events: list[tuple[float, dict[str, Any]]] = []
    rest = b""
    for when, chunk in chunks:
        *whole, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for block in whole:
            data = b"".join(line[5:].strip() for line in block.split(b"\n") if line.startswith(b"data:"))
            if data.startswith(b"{"):
                events.append((when, json.loads(data)))
    return events


class Exchange(asyncio.Protocol):
    """One request and what comes for it until the server closes the connection.

    ``leave`` is asked whether to go away when so many events have come; without it the whole answer is read.
    """

    def __init__(self, payload: bytes, leave: Callable[[int], bool] | None = None) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None
        self._payload = payload
        self._leave = leave
        self._events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._payload)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))
        if self._leave is None:
            return
        self._events += data.count(b"data:")
        if self._leave(self._events) and self.transport is not None:
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


@dataclass(frozen=True, slots=True)
class Client:
    """Sends requests to a port of this machine; an answer that takes longer than ``limit`` seconds is an error."""

    port: int
    api_key: str | None = None
    limit: float = 120.0

    async def send(self, request: Request, leave: Callable[[int], bool] | None = None) -> Answer:
        payload = request.encode(self.api_key)
        sent = time.perf_counter()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.limit):
                _, exchange = await loop.create_connection(lambda: Exchange(payload, leave), HOST, self.port)
                try:
                    await exchange.closed
                finally:
                    if exchange.transport is not None:
                        exchange.transport.abort()
        except TimeoutError:
            return Answer(request, sent, time.perf_counter(), (), f"no whole answer in {self.limit:g} s")
        except OSError as error:
            return Answer(request, sent, time.perf_counter(), (), str(error))
        ended = exchange.pieces[-1][0] if exchange.pieces else time.perf_counter()
        return Answer(request, sent, ended, exchange.pieces, None if exchange.pieces else "closed without an answer")
