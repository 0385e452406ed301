"""Answers that end early: the client goes away, cancels a branch, or the engine refuses or fails.

The engine's streams are replaced by ones that write until they are cancelled.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx2
import openai
import pytest

from pos2d.errors import InputError
from pos2d.runtime.http.service import Service
from pos2d.runtime.serving.jobs import BusyError, Job
from pos2d.runtime.text.completions import Event
from tests.runtime.http.conftest import Server

CHAT = "/v1/chat/completions"
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "one"}], "max_tokens": 4}
LETTER = 65


class EndlessStream:
    """Writes a letter in every branch until it is cancelled; ``fails`` raises an error after some steps."""

    cached_tokens = 0
    prompt_scores = None
    admitted_at = None

    def __init__(self, branches: int, fails: bool = False) -> None:
        self.live, self.cancelled = set(range(branches)), set[int]()
        self._fails = fails

    def cancel(self, branch: int | None = None) -> None:
        self.cancelled |= self.live if branch is None else {branch}

    async def __aiter__(self) -> AsyncIterator[Sequence[Event]]:
        steps = 0
        while self.live:
            ended, self.live = self.live & self.cancelled, self.live - self.cancelled
            reason: Any = "cancelled"
            yield [Event(branch, None, "", None, reason) for branch in ended]
            yield [Event(branch, LETTER, "a") for branch in self.live]
            await asyncio.sleep(0.005)
            steps += 1
            if self._fails and steps == 3:
                raise InputError("the model gives logits that are not finite")


@pytest.fixture
def streams(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[EndlessStream]:
    made: list[EndlessStream] = []

    async def submit(job: Job) -> Any:
        made.append(EndlessStream(len(job.layout.last)))
        return made[-1]

    monkeypatch.setattr(server.engine, "submit", submit)
    return made


def eventually(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + 3
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)
    return holds()


@pytest.mark.parametrize("change", [{"stream": True}, {}, {"stream": True, "branches": ["a", "b"]}])
def test_a_client_that_goes_away_frees_its_rows(
    server: Server, streams: list[EndlessStream], change: dict[str, Any]
) -> None:
    service: Service = server.app.state.service
    with httpx2.Client(base_url=server.url, timeout=0.2) as client:
        if change:
            with client.stream("POST", CHAT, json=ASKED | change) as response:
                next(response.iter_raw())
        else:
            with pytest.raises(httpx2.ReadTimeout):
                client.post(CHAT, json=ASKED)
    assert len(streams) == 1
    assert eventually(lambda: bool(streams[0].cancelled) and not service.running)
    assert streams[0].cancelled == set(range(2 if "branches" in change else 1))


def test_one_branch_ends_and_the_others_go_on(
    http: httpx2.Client, server: Server, streams: list[EndlessStream]
) -> None:
    body = ASKED | {"branches": ["a", "b", "c"], "stream": True}
    finished: dict[int, str] = {}
    written_after = set[int]()
    with http.stream("POST", CHAT, json=body) as response:
        for line in response.iter_lines():
            if not line or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            choice = chunk["choices"][0]
            path = f"/v1/requests/{chunk['id']}/cancel"
            if "pos2d" in chunk:
                assert httpx2.post(server.url + path, json={"branch": 3}).status_code == 400
                assert httpx2.post(server.url + path, json={"branch": 1}).json() == {"id": chunk["id"], "branch": 1}
            if choice["finish_reason"]:
                finished[choice["index"]] = choice["finish_reason"]
                if len(finished) == 1:
                    assert finished == {1: "stop"}
            elif finished and choice["delta"].get("content"):
                written_after.add(choice["index"])
                if written_after == {0, 2}:
                    httpx2.post(server.url + path, json={})
    assert written_after == {0, 2}
    assert finished == {0: "stop", 1: "stop", 2: "stop"}
    assert httpx2.post(server.url + path, json={}).status_code == 404


def test_a_full_queue_is_429_and_leaves_nothing_behind(
    http: httpx2.Client, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[EndlessStream] = []

    async def submit(job: Job) -> Any:
        if len(made) == 2:
            raise BusyError("2 requests are waiting; try again later", 3.2)
        made.append(EndlessStream(1))
        return made[-1]

    monkeypatch.setattr(server.engine, "submit", submit)
    response = http.post("/v1/completions", json={"prompt": ["a", "b", "c"]})
    assert response.status_code == 429
    assert response.headers["Retry-After"] == "4"
    assert response.json()["error"]["type"] == "rate_limit_error"
    assert [stream.cancelled for stream in made] == [{0}, {0}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, ASKED),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/generate", {"prompt": "a"}),
    ],
)
def test_a_full_queue_refuses_before_a_text_is_rendered_or_encoded(
    http: httpx2.Client, server: Server, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    def full() -> None:
        raise BusyError("2 requests are waiting; try again later", 3.2)

    monkeypatch.setattr(server.engine, "check_room", full)
    for module in ("pos2d.runtime.http.texts", "pos2d.runtime.http.plans"):
        monkeypatch.setattr(f"{module}.encode", None)
    monkeypatch.setattr(server.app.state.service, "templates", None)
    response = http.post(path, json=body)
    assert (response.status_code, response.headers["Retry-After"]) == (429, "4")
    assert response.json()["error"]["code"] == "queue_full"


def test_an_error_while_writing_is_an_event_or_a_status(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def submit(job: Job) -> Any:
        return EndlessStream(1, fails=True)

    monkeypatch.setattr(server.engine, "submit", submit)
    create: Any = server.client.chat.completions.create
    with pytest.raises(openai.UnprocessableEntityError, match="finite"):
        create(model="tiny", **ASKED)
    written: list[str] = []
    with pytest.raises(openai.APIError, match="finite"):
        written.extend(chunk.choices[0].delta.content for chunk in create(model="tiny", **ASKED, stream=True))
    assert "a" in written
    assert eventually(lambda: not server.app.state.service.running)
