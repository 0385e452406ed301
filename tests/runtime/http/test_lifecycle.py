"""What a server does with its jobs: their time limits, their numbers, and how it ends."""

import asyncio
import socket
from collections.abc import Sequence
from contextlib import aclosing, suppress
from typing import Any

import pytest

from pos2d.errors import OutputError, UsageError
from pos2d.layout import build_layout
from pos2d.runtime.engine.sampling import Sampling
from pos2d.runtime.http.lifecycle import Lifecycle
from pos2d.runtime.http.listening import bind, listen, url_of
from pos2d.runtime.http.metrics import Metrics
from pos2d.runtime.http.refusals import RefusedError
from pos2d.runtime.http.request_end import one_request
from pos2d.runtime.http.watching import Watch
from pos2d.runtime.serving.engine import Engine
from pos2d.runtime.serving.jobs import EngineLoad, Job
from pos2d.runtime.serving.streams import Stream
from pos2d.runtime.text.completions import Event
from tests.runtime.http.servers import serving, until

# How an engine may end a branch that was cancelled.
CANCELLED: Any = "cancelled"


def number(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(f"pos2d:{name}", labels) or 0.0


class NotedStream(Stream):
    """A stream without an engine, which notes whether its job was cancelled."""

    def __init__(self) -> None:
        super().__init__(asyncio.get_running_loop(), lambda _stream, _branch: setattr(self, "is_cancelled", True))
        self.is_cancelled = False


class Watched:
    """A stream that a test fills, watched as the routes watch one."""

    def __init__(self, timeout: float = 60.0, branches: int = 2) -> None:
        self.lifecycle, self.metrics = Lifecycle(grace=1.0), Metrics()
        self.stream = NotedStream()
        watch = Watch(self.lifecycle, self.metrics, timeout)
        self.events = watch.follow(self.stream, branches=branches, prompt_tokens=7)

    async def rest(self) -> list[list[Event]]:
        async with aclosing(self.events):
            return [list(events) async for events in self.events]


def put(stream: Stream, *steps: Sequence[Event] | Exception | None) -> None:
    for step in steps:
        stream.items.put_nowait(step)


FIRST = [Event(0, 1, "a"), Event(1, 2, "b")]
LAST = [Event(0, None, "", finish_reason="stop"), Event(1, 3, "c", finish_reason="length")]


def test_a_job_that_ends_is_handed_on_and_counted() -> None:
    async def check() -> None:
        watched = Watched()
        watched.stream.cached_tokens = 3
        put(watched.stream, FIRST, LAST, None)
        assert await watched.rest() == [FIRST, LAST]
        assert not watched.stream.is_cancelled
        metrics = watched.metrics
        for name, value in (
            ("prompt_tokens_total", 7),
            ("prefix_cache_queries_total", 7),
            ("prefix_cache_hits_total", 3),
            ("generation_tokens_total", 3),
            ("time_to_first_token_seconds_count", 1),
            ("inter_token_latency_seconds_count", 1),
            ("e2e_request_latency_seconds_count", 1),
            ("request_queue_time_seconds_count", 1),
        ):
            assert number(metrics, name) == value, name
        assert number(metrics, "request_success_total", finished_reason="stop") == 1
        assert number(metrics, "request_success_total", finished_reason="length") == 1

    asyncio.run(check())


@pytest.mark.parametrize("end", [[], [Event(1, None, "", finish_reason=CANCELLED)]], ids=["silent", "cancelled"])
def test_a_job_that_takes_too_long_ends_with_length(end: list[Event]) -> None:
    """Whether the engine says that a branch was cancelled, or leaves that out."""

    async def check() -> None:
        watched = Watched(timeout=0.05)
        put(watched.stream, FIRST, [Event(0, None, "", finish_reason="stop")])
        seen = [await anext(watched.events), await anext(watched.events)]
        until_cancelled = asyncio.create_task(cancelled(watched.stream))
        await until_cancelled
        put(watched.stream, *([end] if end else []), None)
        seen += await watched.rest()
        assert [event.finish_reason for events in seen for event in events] == [None, None, "stop", "length"]
        assert number(watched.metrics, "request_success_total", finished_reason="length") == 1

    asyncio.run(check())


async def cancelled(stream: NotedStream) -> None:
    async with asyncio.timeout(5):
        while not stream.is_cancelled:
            await asyncio.sleep(0.005)


def test_a_job_that_does_not_begin_in_time_is_refused() -> None:
    async def check() -> None:
        watched = Watched(timeout=0.05)
        with pytest.raises(RefusedError) as caught:
            await watched.rest()
        assert caught.value.status == 503
        assert caught.value.retry_after is not None
        assert watched.stream.is_cancelled

    asyncio.run(check())


def test_a_reader_that_leaves_cancels_the_job() -> None:
    async def check() -> None:
        watched = Watched()
        put(watched.stream, FIRST)
        async with aclosing(watched.events):
            await anext(watched.events)
        assert watched.stream.is_cancelled
        assert number(watched.metrics, "request_success_total", finished_reason="abort") == 2
        assert number(watched.metrics, "e2e_request_latency_seconds_count") == 0

    asyncio.run(check())


def test_a_task_that_is_cancelled_cancels_the_job() -> None:
    async def check() -> None:
        watched = Watched()
        put(watched.stream, FIRST)
        reading = asyncio.create_task(watched.rest())
        await asyncio.sleep(0.05)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert watched.stream.is_cancelled

    asyncio.run(check())


def test_a_request_that_ends_before_its_job_is_read_cancels_it() -> None:
    """As where a client goes away between the status line and the first token."""

    async def check() -> None:
        with suppress(ConnectionError), one_request():
            watched = Watched()
            await asyncio.sleep(0)
            raise ConnectionError
        assert watched.stream.is_cancelled
        assert number(watched.metrics, "request_success_total", finished_reason="abort") == 2
        with one_request():
            watched = Watched()
            put(watched.stream, FIRST, LAST, None)
            await watched.rest()
        assert not watched.stream.is_cancelled

    asyncio.run(check())


def test_the_end_of_the_server_stops_jobs() -> None:
    async def check() -> None:
        watched = Watched()
        put(watched.stream, FIRST)
        await anext(watched.events)
        watched.lifecycle.end()
        assert watched.stream.is_cancelled
        put(watched.stream, None)
        (ends,) = await watched.rest()
        assert {event.finish_reason for event in ends} == {"length"}

    asyncio.run(check())


def test_an_error_of_the_engine_is_raised_and_leaves_nothing() -> None:
    async def check() -> None:
        watched = Watched()
        put(watched.stream, ValueError("broken"))
        with pytest.raises(ValueError, match="broken"):
            await watched.rest()
        watched.lifecycle.end()  # nothing is registered any more, so nothing is called

    asyncio.run(check())


def test_a_real_job_passes_through(engine: Engine) -> None:
    """With a limit of time that the job needs more than, it ends early and as if its length was reached."""

    async def answer(timeout: float, tokens: int) -> list[Event]:
        layout = build_layout([[65, 66], [67]], engine.artifact.manifest.rope_2d)
        sampling = Sampling(max_new_tokens=tokens)
        stream = await engine.submit(engine.prepare(Job(layout, (sampling, sampling), ((0,), (1,)))))
        watched = Watch(Lifecycle(1.0), Metrics(), timeout).follow(stream, branches=2, prompt_tokens=3)
        async with aclosing(watched):
            return [event async for events in watched for event in events]

    whole = asyncio.run(answer(60.0, 5))
    assert len([event for event in whole if event.finish_reason]) == 2
    short = asyncio.run(answer(0.1, 240))
    ends = [event.finish_reason for event in short if event.finish_reason]
    assert len(ends) == 2
    until(lambda: engine.load().running == 0)


def test_what_runs_is_finished_and_nothing_else_is_admitted(engine: Engine) -> None:
    with serving(engine, grace=5.0) as server, socket.create_connection(server.address, timeout=5) as connection:
        assert server.request("/ready").json() == {"status": "ready"}
        connection.sendall(b"GET /wait HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert server.toy.waiting.wait(5)
        server.services.lifecycle.close()
        refused = server.request("/echo")
        assert refused.status_code == 503
        assert 1 <= int(refused.headers["retry-after"]) <= 7
        assert (server.request("/ready").status_code, server.request("/health").status_code) == (503, 200)
        assert b'requests_refused_total{status="503"} 2.0' in server.request("/metrics").content
        server.toy.release.set()
        received = b""
        while part := connection.recv(1000):
            received += part
        assert received.endswith(b"done\r\n0\r\n\r\n")
        server.thread.join(5)
        assert not server.thread.is_alive()


def test_an_answer_without_end_does_not_hold_the_server(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pos2d.runtime.http.server.LAST_SECONDS", 0)
    with serving(engine, grace=0.1) as server, socket.create_connection(server.address, timeout=5) as connection:
        connection.sendall(b"GET /wait HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert server.toy.waiting.wait(5)
        stopped: list[int] = []
        server.services.lifecycle.at_end(lambda: stopped.append(1))
        server.services.lifecycle.close()
        server.thread.join(9)
        assert not server.thread.is_alive()
        assert stopped == [1]
        assert server.toy.cancelled.is_set()


def test_a_dead_engine_is_seen(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(engine) as server:
        monkeypatch.setattr(Engine, "is_alive", False)
        assert (server.request("/ready").status_code, server.request("/health").status_code) == (503, 503)
        assert server.request("/health", "POST").status_code == 405


def test_numbers_of_the_engine_are_read_when_asked_for() -> None:
    body, content_type = Metrics().text(EngineLoad(2, 3, 9, 5, 10))
    assert content_type.startswith("text/plain")
    lines = body.decode().splitlines()
    for line in ("running 2.0", "waiting 3.0"):
        assert f"pos2d:num_requests_{line}" in lines
    assert "pos2d:num_branches_running 9.0" in lines
    assert "pos2d:kv_cache_usage_perc 0.5" in lines


def test_a_port_in_use_is_an_error() -> None:
    with bind("127.0.0.1", 0) as first:
        port = int(url_of(first).rpartition(":")[2])
        with bind("127.0.0.1", port) as second:  # neither listens yet
            listen(first, 1)
            with pytest.raises(OutputError, match=f"`port` {port} .* in use"):
                listen(second, 1)
        with pytest.raises(OutputError, match=f"`port` {port} .* in use"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "a" * 300])
def test_an_address_of_another_machine_is_an_error(host: str) -> None:
    with pytest.raises(UsageError, match="`host`"):
        bind(host, 0)


@pytest.mark.parametrize("host", ["::1", "::"])
def test_addresses_of_version_6_have_brackets(host: str) -> None:
    try:
        bound = bind(host, 0)
    except UsageError:
        pytest.skip("no IPv6 here")
    with bound:
        assert url_of(bound).startswith("http://[::1]:")
