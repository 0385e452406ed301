"""Chat completions over HTTP are the answers that the library gives in process."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from pos2d import runtime
from pos2d.runtime.http.options import ServeOptions
from pos2d.runtime.http.plans import tokens_of
from pos2d.runtime.http.schemas.chat import ChatChunk, ChatCompletion
from pos2d.runtime.http.schemas.completions import Completion
from pos2d.runtime.http.schemas.small import TokenizeRequest
from pos2d.runtime.http.service import Service
from pos2d.runtime.http.settings import ServerSettings
from pos2d.runtime.http.shell import Services
from pos2d.runtime.serving.engine import Engine
from tests.runtime.http.conftest import Server

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}]
QUESTIONS = ["one", "and two", "a third", "the fourth question"]


def events_of(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    form = ChatChunk if '"chat.completion.chunk"' in lines[0] else Completion
    for line in lines[:-1]:
        form.model_validate_json(line)
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_an_answer_and_the_library_say_the_same(server: Server) -> None:
    expected = server.model.chat(ASKED, max_new_tokens=12)
    create: Any = server.client.chat.completions.create
    asked: Any = {"model": "tiny", "messages": ASKED, "max_tokens": 12}
    whole = create(**asked)
    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].finish_reason == expected.finish_reason
    assert whole.usage.completion_tokens == len(expected.token_ids)
    chunks = list(create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == expected.finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    # Of a prompt that was answered before, its last token alone is read again.
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("visibility", [None, "columnar", "isolated"])
def test_branches_are_those_of_the_library(server: Server, http: httpx2.Client, visibility: Any) -> None:
    expected = server.model.generate(QUESTIONS, "Be brief.", max_new_tokens=9, visibility=visibility)
    body = {"messages": ASKED[:1], "branches": QUESTIONS, "max_tokens": 9, "visibility": visibility}
    whole = http.post("/v1/chat/completions", json=body).json()
    assert [choice["message"]["content"] for choice in whole["choices"]] == [answer.text for answer in expected]
    ChatCompletion.model_validate(whole)
    info = whole["pos2d"]
    assert len(info["branches"]) == len(QUESTIONS)
    assert info["visibility"] == (visibility or "columnar")
    own = sum(branch["tokens"] for branch in info["branches"])
    assert whole["usage"]["prompt_tokens"] == own + len(QUESTIONS) * info["context_tokens"]
    usage = http.post("/v1/chat/completions", json=body | {"branches": QUESTIONS[:1]}).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == info["context_tokens"]
    usage = http.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4 * info["context_tokens"]
    streamed = events_of(http.post("/v1/chat/completions", json=body | {"stream": True}).text)
    assert streamed[0]["pos2d"] == info
    assert not any("pos2d" in chunk for chunk in streamed[1:])
    texts = [""] * len(QUESTIONS)
    for chunk in streamed:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    assert texts == [answer.text for answer in expected]


def test_branches_need_no_messages(server: Server, http: httpx2.Client) -> None:
    expected = server.model.generate(QUESTIONS[:2], max_new_tokens=5)
    whole = http.post("/v1/chat/completions", json={"messages": [], "branches": QUESTIONS[:2], "max_tokens": 5}).json()
    assert [choice["message"]["content"] for choice in whole["choices"]] == [answer.text for answer in expected]


def test_several_answers_of_one_seed_differ_and_are_the_same_next_time(server: Server) -> None:
    """The first of them is the single answer of that seed."""
    create: Any = server.client.chat.completions.create
    asked: Any = {"model": "tiny", "messages": ASKED, "max_tokens": 12, "temperature": 1, "seed": 5}
    texts = [choice.message.content for choice in create(**asked, n=4).choices]
    assert len(set(texts)) == 4
    assert [choice.message.content for choice in create(**asked, n=4).choices] == texts
    assert create(**asked).choices[0].message.content == texts[0]
    assert server.model.chat(ASKED, max_new_tokens=12, temperature=1.0, seed=5).text == texts[0]
    assert create(**asked | {"seed": 6}, n=4).choices[0].message.content != texts[0]


def test_without_a_seed_answers_differ(server: Server) -> None:
    create: Any = server.client.chat.completions.create
    asked: Any = {"model": "tiny", "messages": ASKED, "max_tokens": 12, "temperature": 1}
    assert create(**asked).choices[0].message.content != create(**asked).choices[0].message.content


def test_log_probabilities_are_those_of_the_library(server: Server) -> None:
    expected = server.model.chat(ASKED, max_new_tokens=12, logprobs=True)
    asked: Any = {"model": "tiny", "messages": ASKED, "max_tokens": 12, "logprobs": True}
    create: Any = server.client.chat.completions.create
    entries = create(**asked).choices[0].logprobs.content
    assert expected.logprobs is not None
    assert [entry.logprob for entry in entries] == pytest.approx(expected.logprobs, abs=1e-4)
    assert bytes(byte for entry in entries for byte in entry.bytes).decode(errors="replace") == expected.text
    streamed = [
        entry
        for chunk in create(**asked, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == entries


def test_a_stop_string_ends_an_answer(server: Server) -> None:
    text = server.model.chat(ASKED, max_new_tokens=12).text
    create: Any = server.client.chat.completions.create
    choice = create(model="tiny", messages=ASKED, max_tokens=12, stop=[text[4:6], "\0"]).choices[0]
    assert choice.message.content == text[: text.index(text[4:6])]
    assert choice.finish_reason == "stop"


def test_messages_of_parts_and_of_developers_are_read(server: Server, http: httpx2.Client) -> None:
    plain = {"messages": ASKED, "max_tokens": 5}
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "one", "name": None},
    ]
    texts = [
        http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        for body in (plain, plain | {"messages": parts, "tools": [], "tool_choice": "auto", "n": 1.0, "store": False})
    ]
    assert texts[0] == texts[1]


def test_the_most_likely_tokens_and_penalties_are_the_librarys(server: Server, http: httpx2.Client) -> None:
    options: Any = {"frequency_penalty": 1.5, "presence_penalty": -0.5, "logit_bias": {"65": 2.5}, "top_logprobs": 3}
    expected = server.model.chat(ASKED, max_new_tokens=9, logprobs=True, **options)
    body = {"messages": ASKED, "max_tokens": 9, "logprobs": True, **options}
    choice = http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["message"]["content"] == expected.text
    found = [[top["logprob"] for top in entry["top_logprobs"]] for entry in choice["logprobs"]["content"]]
    assert expected.top_logprobs is not None
    for likely, top in zip(found, expected.top_logprobs, strict=True):
        assert likely == pytest.approx([logprob for _, logprob in top], abs=1e-4)


def test_greedy_answers_do_not_depend_on_how_a_choice_would_be_narrowed(http: httpx2.Client) -> None:
    """Clients send both; without a temperature it is not clear what is meant."""
    body: Any = {"messages": ASKED, "max_tokens": 5}
    plain = http.post("/v1/chat/completions", json=body | {"temperature": 0}).json()["choices"]
    narrowed = {"top_p": 0.5, "top_k": 3, "min_p": 0.1}
    assert http.post("/v1/chat/completions", json=body | narrowed | {"temperature": 0}).json()["choices"] == plain
    refused = http.post("/v1/chat/completions", json=body | narrowed)
    assert (refused.status_code, "temperature" in refused.text) == (400, True)


def test_answers_follow_a_schema(http: httpx2.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 22]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    body = {"messages": ASKED, "max_tokens": 40, "temperature": 1, "n": 4, "response_format": form}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    for choice in response.json()["choices"]:
        assert json.loads(choice["message"]["content"])["a"] in (1, 22)
    wrong = body | {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}}}
    refused = http.post("/v1/chat/completions", json=wrong)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format")


def test_answers_are_text_in_utf8_on_one_line(http: httpx2.Client) -> None:
    """Characters are themselves, but for those at which readers of streams may end a line."""
    text = "你好\u2028\x85"
    body = {"prompt": text, "max_tokens": 1, "echo": True}
    answer = http.post("/v1/completions", json=body)
    assert answer.json()["choices"][0]["text"].startswith(text)
    assert "你好" in answer.content.decode()
    assert not {"\u2028", "\x85"} & set(answer.content.decode())
    streamed = http.post("/v1/completions", json=body | {"stream": True}).content.decode()
    assert "你好" in streamed
    assert not {"\u2028", "\x85"} & set(streamed)


def test_the_context_of_the_server_is_the_system_message_of_conversations_without_one(talking: Path) -> None:
    engine = Engine(runtime.load(talking / "onnx"))
    services = Services.of(engine, ServeOptions())
    service = Service(engine, ServerSettings(model="tiny", context="Be brief."), services)
    asked = [{"role": "user", "content": "a"}]
    assert service.with_context(asked) == [{"role": "system", "content": "Be brief."}, *asked]
    own = [{"role": "system", "content": "Be long."}, *asked]
    assert service.with_context(own) == own

    async def ids(messages: list[dict[str, str]]) -> list[int]:
        return await tokens_of(service, TokenizeRequest.model_validate({"messages": messages}))

    async def counted() -> tuple[list[int], list[int]]:
        try:
            return await ids(asked), await ids(service.with_context(asked))
        finally:
            await services.templates.close()

    alone, whole = asyncio.run(counted())
    assert alone == whole
    service.close()
    engine.close()
