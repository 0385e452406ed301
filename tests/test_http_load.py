"""The load generator of the serving benchmarks reads answers as they come, and counts what is whole."""

import asyncio
import contextlib
import json
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
GAP = 0.05


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))


def chunk(event: Any) -> bytes:
    data = b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


def said(index: int, text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": index, "text": text, "finish_reason": reason}]}


async def answered(serve: Serve, limit: float = 5.0, leave: Callable[[int], bool] | None = None) -> Any:
    """What the load generator makes of what ``serve`` sends."""
    from http_load import Client, Request

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            await serve(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        handled.set()

    handled = asyncio.Event()
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        answer = await Client(port, limit=limit).send(Request("/v1/completions", {"prompt": "x"}), leave)
        await handled.wait()
        return answer


async def stream(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Two branches whose chunks are cut in the middle, and pauses between them."""
    writer.write(HEAD + chunk(said(0, "a")) + chunk(said(1, "x")))
    await writer.drain()
    await asyncio.sleep(GAP)
    whole = chunk(said(0, "é")) + chunk(said(1, "", "stop"))
    writer.write(whole[:40])
    await asyncio.sleep(GAP)
    last = chunk({"choices": [], "usage": {"completion_tokens": 5}}) + chunk(b"[DONE]") + b"0\r\n\r\n"
    writer.write(whole[40:] + chunk(said(0, "", "length")) + last)


def test_an_answer_has_the_texts_and_times_of_its_branches() -> None:
    answer = asyncio.run(answered(stream))
    assert answer.is_whole
    assert answer.texts == {0: "aé", 1: "x"}
    assert answer.tokens == 5
    assert {index: len(times) for index, times in answer.token_times.items()} == {0: 2, 1: 1}
    assert answer.gaps[0] >= 2 * GAP * 0.9  # the text came with the second half of its chunk
    begin = answer.token_times[0][1] - GAP / 2
    assert answer.tokens_between(begin, begin + 1) == pytest.approx(5 / 3)


@pytest.mark.parametrize("ends", [HEAD + chunk(said(0, "a")), HEAD[:30], b""])
def test_an_answer_that_is_cut_off_is_not_whole(ends: bytes) -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(ends)

    assert not asyncio.run(answered(serve)).is_whole


def test_an_answer_that_takes_too_long_is_an_error() -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        await writer.drain()
        await asyncio.sleep(0.4)

    answer = asyncio.run(answered(serve, 0.2))
    assert answer.error == "no whole answer in 0.2 s"
    assert not answer.is_whole


def test_a_client_leaves_after_so_many_events() -> None:
    answer = asyncio.run(answered(stream, leave=lambda events: events >= 2))
    assert answer.texts == {0: "a", 1: "x"}
    assert not answer.is_whole


def test_a_refusal_has_its_status_and_headers() -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 2\r\nContent-Length: 2\r\n\r\n{}")

    answer = asyncio.run(answered(serve))
    assert (answer.status, answer.headers["retry-after"], answer.text) == (429, "2", "{}")


def test_a_figure_that_was_not_measured_does_not_reach_its_bar() -> None:
    from serve_report import Check, ratio

    assert Check("a", 2.0, at_least=2.0).holds
    assert Check("a", 2.0, at_most=2.0).holds
    assert not Check("a", 1.9, at_least=2.0).holds
    assert not Check("a", 2.1, at_most=2.0).holds
    assert math.isnan(ratio(1.0, 0.0))
    assert not Check("a", ratio(1.0, 0.0), at_most=2.0).holds
