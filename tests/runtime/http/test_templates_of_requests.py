"""An artifact without a chat template, and templates that are rendered elsewhere."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from pos2d import runtime
from pos2d.runtime.http.app import create_app
from pos2d.runtime.http.settings import ServerSettings
from pos2d.runtime.http.texts import DirectTemplates
from pos2d.runtime.serving.engine import Engine
from tests.runtime.http.conftest import Server, limits_of

CHAT = {"messages": [{"role": "user", "content": "one"}], "max_tokens": 2}


def test_without_a_chat_template_there_are_completions_alone(talking: Path) -> None:
    model = runtime.load(talking / "onnx")
    model.tokenizer.chat_template = None
    engine = Engine(model)
    client = TestClient(create_app(engine, ServerSettings(model="plain", limits=limits_of(engine))))
    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", CHAT | {"branches": ["a"]}),
        ("/v1/responses", {"input": "one"}),
        ("/tokenize", {"messages": CHAT["messages"]}),
    ):
        response = client.post(path, json=body)
        assert response.status_code == 422
        assert "no chat template" in response.json()["error"]["message"]
    assert client.post("/v1/completions", json={"prompt": "one", "max_tokens": 2}).status_code == 200
    engine.close()


def test_other_templates_are_used_by_every_route(server: Server) -> None:
    class Loud(DirectTemplates):
        async def for_answer(self, messages: Any, arguments: Any = None) -> str:
            return (await super().for_answer(messages, arguments)).upper()

    model = server.model
    loud = Loud(model.tokenizer, ThreadPoolExecutor(max_workers=1))
    app = create_app(server.engine, ServerSettings(model="tiny", limits=limits_of(server.engine)))
    app.state.service.templates = loud
    client = TestClient(app)
    tokens = client.post("/tokenize", json={"messages": CHAT["messages"]}).json()["tokens"]
    assert tokens == model.tokenizer("<USER>ONE\n<ASSISTANT>").input_ids
    expected = model.generate("<USER>ONE\n<ASSISTANT>", ignore_chat_template=True, max_new_tokens=2)[0].text
    answer = client.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]["content"]
    response = client.post("/v1/responses", json={"input": "one", "max_output_tokens": 2}).json()
    assert answer == response["output"][0]["content"][0]["text"] == expected
    app.state.service.close()
