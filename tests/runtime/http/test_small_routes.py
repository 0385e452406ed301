"""The guide's request, token ids, the model's name, and the requests that are refused with the name of their field."""

import json
from typing import Any

import httpx2
import pytest
from pydantic import BaseModel, ValidationError

from pos2d.errors import InputError
from pos2d.runtime.http.schemas.chat import ChatRequest
from pos2d.runtime.http.schemas.completions import CompletionRequest
from pos2d.runtime.http.schemas.responses import ResponseRequest
from pos2d.runtime.http.texts import encode_plain
from pos2d.runtime.text.tokenization import encode
from tests.runtime.http.conftest import Server

ASKED = {"messages": [{"role": "user", "content": "one"}], "max_tokens": 4}
LARGE_SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"title": "b" * 70000}}}
IMAGE = [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def test_generate_is_the_guides(server: Server, http: httpx2.Client) -> None:
    """It continues the text as it is, and gives the text back before its continuation."""
    expected = server.model.generate("你好", ignore_chat_template=True, max_new_tokens=100)[0].text
    content = '{"prompt": "你好", "max_new_tokens": 100, "temperature": 0}'.encode()
    response = http.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert response.json() == {"response": "你好" + expected}
    assert len(http.post("/generate", json={"prompt": "a" * 400}).json()["response"]) > 400  # 512 have no room
    sampled = [http.post("/generate", json={"prompt": "你好", "max_new_tokens": 20}).json() for _ in range(2)]
    assert sampled[0] != sampled[1]


def test_tokenize(server: Server, http: httpx2.Client) -> None:
    tokenizer = server.model.tokenizer
    text = http.post("/tokenize", json={"prompt": "one", "return_token_strs": True}).json()
    assert text == {"count": 3, "max_model_len": 512, "tokens": tokenizer("one").input_ids, "token_strs": list("one")}
    messages = http.post("/tokenize", json={"messages": ASKED["messages"]}).json()
    assert messages["tokens"] == tokenizer("<user>one\n<assistant>").input_ids


def test_models(server: Server) -> None:
    models = server.client.models
    assert [model.id for model in models.list()] == ["tiny"]
    assert models.retrieve("tiny").owned_by == "pos2d"


@pytest.mark.parametrize(
    ("path", "change", "status", "param"),
    [
        (CHAT, {"model": "gpt"}, 404, "model"),
        (CHAT, {"n": 0}, 400, "n"),
        (CHAT, {"n": "2"}, 400, "n"),
        (CHAT, {"n": True}, 400, "n"),
        (CHAT, {"n": 9, "temperature": 1}, 422, "n"),
        (CHAT, {"n": 2}, 400, "n"),
        (CHAT, {"branches": ["a"] * 9}, 422, "branches"),
        (CHAT, {"branches": ["a", " "]}, 422, "branches"),
        (CHAT, {"branches": ["a"], "n": 2}, 400, "n"),
        (CHAT, {"visibility": "isolated"}, 400, "visibility"),
        (CHAT, {"branches": ["a"], "visibility": "all"}, 400, "visibility"),
        (CHAT, {"temperature": 1e309}, 400, "temperature"),
        (CHAT, {"temperature": 1e-5}, 400, "temperature"),
        (CHAT, {"top_p": 0.5}, 400, "top_p"),
        (CHAT, {"temprature": 1}, 400, "temprature"),
        (CHAT, {"tools": [{"type": "function"}]}, 400, "tools"),
        (CHAT, {"store": True}, 400, "store"),
        (CHAT, {"modalities": ["audio"]}, 400, "modalities"),
        (CHAT, {"max_tokens": 0}, 400, "max_tokens"),
        (CHAT, {"max_tokens": 4, "min_new_tokens": 5}, 400, "min_new_tokens"),
        (CHAT, {"max_completion_tokens": 5}, 400, "max_tokens"),
        (CHAT, {"top_logprobs": 3}, 400, "top_logprobs"),
        (CHAT, {"stream_options": {"include_usage": True}}, 400, "stream_options"),
        (CHAT, {"stop": ["a"] * 5}, 422, "stop"),
        (CHAT, {"stop": [""]}, 400, "stop.0"),
        (CHAT, {"seed": -1}, 400, "seed"),
        (CHAT, {"logit_bias": {"300": 1}}, 400, "logit_bias"),
        (CHAT, {"logit_bias": {"x": 1}}, 400, "logit_bias.x"),
        (CHAT, {"response_format": {"type": "xml"}}, 400, "response_format"),
        (CHAT, {"response_format": LARGE_SCHEMA}, 422, "response_format"),
        (CHAT, {"chat_template_kwargs": {"unread": 1}}, 400, "chat_template_kwargs"),
        (CHAT, {"chat_template_kwargs": {"chat_template": "x"}}, 400, "chat_template_kwargs"),
        (CHAT, {"chat_template": "x"}, 400, "chat_template"),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": None}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "messages.0.content"),
        (CHAT, {"messages": [{"role": "tool", "content": ""}]}, 400, "messages.0.role"),
        (CHAT, {"messages": IMAGE}, 400, "messages.0.content.0.type"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 600}]}, 422, "messages"),
        (COMPLETIONS, {"prompt": None}, 400, "prompt"),
        (COMPLETIONS, {"prompt": ""}, 422, "prompt"),
        (COMPLETIONS, {"prompt": []}, 400, "prompt"),
        (COMPLETIONS, {"prompt": [1, 300]}, 422, "prompt"),
        (COMPLETIONS, {"prompt": "a" * 600}, 422, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 65}, 422, "prompt"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "best_of": 2}, 400, "best_of"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, 400, "suffix"),
        (COMPLETIONS, {"prompt": [1], "branches": ["a"]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": "a", "branches": ["a"], "echo": True}, 400, "echo"),
        (COMPLETIONS, {"prompt": "a", "n": 2, "temperature": 1, "echo": True, "logprobs": 1}, 400, "n"),
        ("/generate", {"prompt": "a", "top_p": 1}, 400, "top_p"),
        ("/generate", {"prompt": ""}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": ASKED["messages"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, 400, "add_generation_prompt"),
        ("/v1/requests/chatcmpl-0/cancel", {}, 404, "id"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    http: httpx2.Client, path: str, change: dict[str, Any], status: int, param: str
) -> None:
    body = (ASKED if path == CHAT else {}) | change
    response = http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[0] in error["message"] or status != 400


@pytest.mark.parametrize(
    ("path", "field", "said"),
    [
        (CHAT, "temprature", "; did you mean 'temperature'?"),
        (COMPLETIONS, "max_new_tokens", "; did you mean 'max_tokens'?"),
        ("/generate", "max_tokens", "; did you mean 'max_new_tokens'?"),
        (CHAT, "zzz", "; leave it out"),
    ],
)
def test_a_misspelt_field_is_answered_with_the_one_that_was_meant(
    http: httpx2.Client, path: str, field: str, said: str
) -> None:
    body = (ASKED if path == CHAT else {"prompt": "a"}) | {field: 1}
    assert http.post(path, json=body).json()["error"]["message"].endswith(said)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"messages": NaN}',
        b'{"\\ud800": 1}',
        b'{"n": ' + b"9" * 5000 + b"}",
        b"\xff",
    ],
)
def test_a_body_that_is_no_request_is_refused(http: httpx2.Client, content: bytes) -> None:
    response = http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("form", "body"),
    [
        (CompletionRequest, {"prompt": [1.5] * 5000}),
        (CompletionRequest, {"prompt": [[1.5] * 1000] * 1000}),
        (CompletionRequest, {"prompt": "a", "logit_bias": {f"k{number}": 0 for number in range(5000)}}),
        (ChatRequest, {"messages": [], "metadata": {f"k{number}": 0 for number in range(5000)}}),
        (CompletionRequest, {"prompt": "a", "stop": [1] * 5000}),
        (CompletionRequest, {f"k{number}": 0 for number in range(5000)}),
        (ChatRequest, {"messages": [{}] * 4000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 1000}] * 1000}),
        (ChatRequest, {"messages": [], "branches": [1] * 1000}),
        (ResponseRequest, {"input": [{}] * 4000}),
        (ResponseRequest, {"input": [{"role": "user", "content": [{}] * 1000}] * 1000}),
    ],
)
def test_the_faults_of_a_large_body_are_few(form: type[BaseModel], body: Any) -> None:
    """A report of each would take seconds, in which nobody else is answered."""
    with pytest.raises(ValidationError) as refused:
        form.model_validate(body)
    assert refused.value.error_count() < 50


def test_a_long_text_is_refused_before_all_of_it_is_encoded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []

    def count(tokenizer: Any, text: str, special: bool = False) -> list[int]:
        encoded.append(len(text))
        return encode(tokenizer, text, special)

    monkeypatch.setattr("pos2d.runtime.http.texts.encode", count)
    tokenizer, positions = server.model.tokenizer, 100
    for text, most in (("one " * 100_000, 400), ("a" * 101, 101)):
        encoded.clear()
        with pytest.raises(InputError, match="positions"):
            encode_plain(tokenizer, text, positions)
        assert encoded == [most]
    assert len(encode_plain(tokenizer, "a" * 100, positions)) == 100


def test_text_that_is_no_utf8_is_refused(http: httpx2.Client) -> None:
    content = b'{"prompt": "\\ud800"}'
    response = http.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


def test_other_methods_and_paths_are_refused_in_the_same_form(http: httpx2.Client) -> None:
    for method, path, status in (("GET", CHAT, 405), ("POST", "/v2", 404)):
        response = http.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_every_field_of_openais_client_is_known() -> None:
    from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as Chat
    from openai.types.completion_create_params import CompletionCreateParamsStreaming as Completions

    for fields, body in ((Chat, ChatRequest), (Completions, CompletionRequest)):
        assert set(fields.__annotations__) <= set(body.model_fields)
