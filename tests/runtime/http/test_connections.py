"""Clients that are slow, greedy or gone: each is cut off within its limits, and its request is cancelled."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from pos2d.runtime.http.bodies import answer
from pos2d.runtime.http.refusals import Message, Receive, Scope, Send
from pos2d.runtime.serving.engine import Engine
from tests.runtime.http.servers import CHUNK, SECRET, Running, read_all, serving, until

LIMIT = 100_000
HEAD = b"POST /echo HTTP/1.1\r\nhost: localhost\r\n"


@pytest.fixture(scope="module")
def strict(engine: Engine) -> Iterator[Running]:
    times = {"header_timeout": 0.3, "body_timeout": 0.3, "write_timeout": 0.3}
    with serving(engine, max_body="100kB", max_connections=6, **times) as server:
        yield server


def test_a_body_up_to_the_limit_is_taken(strict: Running) -> None:
    assert strict.request("/echo", "POST", content=b"a" * LIMIT).text == str(LIMIT)


def test_a_larger_one_is_refused_before_it_is_sent(strict: Running) -> None:
    before = len(strict.toy.bodies)
    answer = strict.talk(HEAD + b"content-length: %d\r\nexpect: 100-continue\r\n\r\n" % (LIMIT + 1))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer
    assert len(strict.toy.bodies) == before


def test_a_larger_one_in_chunks_is_refused_while_it_is_read(strict: Running) -> None:
    before = len(strict.toy.bodies)
    chunk = b"8000\r\n" + b"a" * 0x8000 + b"\r\n"
    answer = strict.talk(HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunk * 5 + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert len(strict.toy.bodies) == before


def test_a_client_that_writes_all_of_it_reads_the_refusal(strict: Running) -> None:
    for _ in range(5):
        assert strict.request("/echo", "POST", content=b"a" * 10 * LIMIT).status_code == 413


@pytest.mark.parametrize("length", [b"-1", b"1e3", b"9" * 30, b"0x10"])
def test_a_length_that_is_none_is_refused(strict: Running, length: bytes) -> None:
    answer = strict.talk(HEAD + b"content-length: " + length + b"\r\n\r\n")
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 "))


def test_a_slow_body_is_cut_off(strict: Running) -> None:
    started = time.monotonic()
    with socket.create_connection(strict.address, timeout=5) as connection:
        connection.sendall(HEAD + b"content-length: 1000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(50):
                connection.sendall(b"a")
                time.sleep(0.02)
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - started < 4


@pytest.mark.parametrize("before", [b"", b"GET /echo HTTP/1.1\r\nhost: localhost\r\n\r\n"], ids=["first", "second"])
def test_a_slow_head_is_cut_off(strict: Running, before: bytes) -> None:
    """Of the first request of a connection, and of a later one."""
    started = time.monotonic()
    with socket.create_connection(strict.address, timeout=5) as connection:
        connection.sendall(before)
        if before:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /")
        with contextlib.suppress(ConnectionError):
            for _ in range(25):
                connection.sendall(b"a")
                time.sleep(0.02)
        assert b"HTTP/1.1 408 " in read_all(connection)
    assert time.monotonic() - started < 2


def test_a_connection_without_a_request_is_closed(strict: Running) -> None:
    assert strict.talk(b"").startswith(b"HTTP/1.1 408 ")


def test_a_large_head_is_refused(strict: Running) -> None:
    assert strict.talk(HEAD + b"x: " + b"a" * 70_000).startswith(b"HTTP/1.1 400 ")


def test_connections_have_a_limit(strict: Running) -> None:
    """Those above it are told so; they are answered again once others left."""
    with contextlib.ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(socket.create_connection(strict.address, timeout=5))
        answer = strict.talk(b"")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in answer
    until(lambda: b" 200 " in strict.talk(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"))


def test_an_answer_that_is_not_read_ends(strict: Running) -> None:
    """Of what the client does not read, only a small part is held."""
    strict.toy.cancelled.clear()
    strict.toy.chunks = 0
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(strict.address)
        connection.sendall(b"GET /stream HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert strict.toy.cancelled.wait(5)
    assert strict.toy.chunks * CHUNK < 16_000_000
    until(lambda: strict.services.lifecycle.active == 0)


def test_an_answer_that_is_read_goes_on(strict: Running) -> None:
    strict.toy.cancelled.clear()
    with socket.create_connection(strict.address, timeout=5) as connection:
        connection.sendall(b"GET /stream HTTP/1.1\r\nhost: localhost\r\n\r\n")
        end = time.monotonic() + 0.7
        while time.monotonic() < end:
            assert connection.recv(65536)
        assert not strict.toy.cancelled.is_set()
    assert strict.toy.cancelled.wait(5)


def test_a_client_that_goes_away_cancels_its_request(strict: Running) -> None:
    strict.toy.cancelled.clear()
    strict.toy.waiting.clear()
    with socket.create_connection(strict.address, timeout=5) as connection:
        connection.sendall(b"GET /wait HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert strict.toy.waiting.wait(5)
    assert strict.toy.cancelled.wait(1)
    until(lambda: strict.services.lifecycle.active == 0)


def test_an_application_that_never_waits_is_cancelled_too() -> None:
    """Sending to a client that is gone succeeds at once."""
    sent = 0

    async def endless(_scope: Scope, _receive: Receive, send: Send) -> None:
        while True:
            await send({"type": "http.response.body", "body": b"a", "more_body": True})

    async def send(_message: Message) -> None:
        nonlocal sent
        sent += 1
        assert sent < 1000

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    asyncio.run(answer(endless, {"type": "http"}, b"", receive, send))


def test_an_error_is_one_line_without_what_it_says(strict: Running, capfd: pytest.CaptureFixture[str]) -> None:
    answer = strict.request("/crash?prompt=secret", "POST", content=b"secret")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: POST /crash: ValueError at servers.py:")
    assert SECRET not in lines[0] + answer.text


def test_an_answer_that_breaks_off_does_not_look_complete(strict: Running, capfd: pytest.CaptureFixture[str]) -> None:
    answer = strict.talk(b"GET /break HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert b"begun" in answer
    assert not answer.endswith(b"0\r\n\r\n")
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_line_of_the_log_is_one_line(engine: Engine, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(engine, access_log=True) as server:
        server.request("/echo%0Aerror:%1b[2J?prompt=secret")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("GET /echo\\nerror:\\x1b[2J 200 ")
    assert "secret" not in line
