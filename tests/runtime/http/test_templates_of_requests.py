"""An artifact without a chat template, and that every route has its messages rendered by the service for them."""

from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient

from pos2d.runtime.http.app import create_app
from pos2d.runtime.http.settings import ServerSettings
from pos2d.runtime.serving.engine import Engine
from tests.runtime.http.conftest import Server
from tests.runtime.http.servers import services_of

CHAT = {"messages": [{"role": "user", "content": "one"}], "max_tokens": 2}


def test_without_a_chat_template_there_are_completions_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page asks for a completion where it reads these words with status 400."""
    monkeypatch.setattr(engine.artifact.tokenizer, "chat_template", None)
    services = services_of(engine)
    assert not services.has_template
    app = create_app(engine, ServerSettings(model="plain"), services)
    client = TestClient(app)
    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", CHAT | {"branches": ["a"]}),
        ("/v1/responses", {"input": "one"}),
        ("/tokenize", {"messages": CHAT["messages"]}),
    ):
        response = client.post(path, json=body)
        assert response.status_code == 400
        assert "chat template" in response.json()["error"]["message"]
        assert response.json()["error"]["param"] in body
    assert client.post("/v1/completions", json={"prompt": "one", "max_tokens": 2}).status_code == 200
    app.state.service.close()


def test_every_route_has_messages_rendered_by_the_service(
    server: Server, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    templates = server.app.state.service.templates

    async def loud(messages: Any, arguments: Any = None) -> str:
        return "<USER>ONE\n<ASSISTANT>"

    monkeypatch.setattr(templates, "for_answer", loud)
    tokens = http.post("/tokenize", json={"messages": CHAT["messages"]}).json()["tokens"]
    assert tokens == server.model.tokenizer("<USER>ONE\n<ASSISTANT>").input_ids
    expected = server.model.generate("<USER>ONE\n<ASSISTANT>", ignore_chat_template=True, max_new_tokens=2)[0].text
    answer = http.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]["content"]
    response = http.post("/v1/responses", json={"input": "one", "max_output_tokens": 2}).json()
    assert answer == response["output"][0]["content"][0]["text"] == expected
