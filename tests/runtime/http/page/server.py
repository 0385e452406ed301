"""A small server for tests of the page: the page's own routes, and scripted answers in the real server's form."""

import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from pos2d.runtime.http.page_routes import page_routes

MODEL = "scripted-model"


@dataclass
class Script:
    """How the server behaves. ``refusals`` are answered first: status, headers, and the error or a raw body.

    ``texts`` are the answers by branch; a branch without a text writes words until its token limit. ``breaks_after``
    steps the connection ends. ``bodies`` are the requests that came.
    """

    pace: float = 0.004
    texts: dict[int, str] = field(default_factory=dict)
    refusals: list[tuple[int, dict[str, str], dict[str, Any] | str]] = field(default_factory=list)
    has_chat_template: bool = True
    key: str | None = None
    breaks_after: int | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    cancelled: dict[str, set[int]] = field(default_factory=dict)

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]


def error(status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None) -> Response:
    body = {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": None}}
    return JSONResponse(body, status, headers)


def make_app(script: Script) -> FastAPI:
    app = FastAPI()
    app.include_router(page_routes())

    @app.middleware("http")
    async def check_key(request: Request, call_next: Any) -> Response:
        is_open = not script.key or not request.url.path.startswith("/v1/")
        if not is_open and request.headers.get("authorization") != f"Bearer {script.key}":
            return error(401, "a key is required, as `Authorization: Bearer KEY`")
        return await call_next(request)  # type: ignore[no-any-return]

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": MODEL, "object": "model"}]}

    @app.post("/v1/requests/{request_id}/cancel")
    def cancel(request_id: str, body: dict[str, Any]) -> Response:
        if request_id not in script.cancelled:
            return error(404, "no request with this id is running")
        branches = {body["branch"]} if "branch" in body else set(range(100))
        script.cancelled[request_id] |= branches
        return JSONResponse({})

    @app.post("/v1/chat/completions")
    @app.post("/v1/completions")
    async def answer(request: Request) -> Response:
        body = await request.json()
        script.bodies.append({**body, "path": request.url.path})
        if script.refusals:
            status, headers, content = script.refusals.pop(0)
            return (
                Response(content, status, headers)
                if isinstance(content, str)
                else JSONResponse(content, status, headers)
            )
        is_chat = request.url.path.startswith("/v1/chat")
        if is_chat and not script.has_chat_template:
            return error(400, "the artifact has no chat template; use /v1/completions", "messages")
        return StreamingResponse(stream(script, body, is_chat), media_type="text/event-stream")

    return app


def words_of(text: str) -> list[str]:
    """The text in pieces of a few characters, as tokens would be."""
    return [text[at : at + 4] for at in range(0, len(text), 4)]


async def stream(script: Script, body: dict[str, Any], is_chat: bool) -> AsyncIterator[str]:
    """The events of one request: every step has one token of each branch that is not over."""
    name = f"chatcmpl-{uuid.uuid4().hex}"
    script.cancelled[name] = set()
    context = len(json.dumps(body.get("messages") or body.get("prompt") or "")) // 4
    own = [len(question) // 4 + 1 for question in body["branches"]]
    limit = body.get("max_tokens", 64)
    left = {k: words_of(script.texts.get(k, "word" * limit))[:limit] for k in range(len(own))}

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps({'id': name, 'model': MODEL, 'choices': choices, **more}, ensure_ascii=False)}\n\n"

    def choice(index: int, text: str, reason: str | None = None) -> dict[str, Any]:
        words = {"delta": {"content": text}} if is_chat else {"text": text}
        scores = {"content": [{"token": text}]} if is_chat else {"tokens": [text]}
        return {"index": index, **words, "logprobs": scores if text else None, "finish_reason": reason}

    visibility = body.get("visibility", "columnar")
    branches = [{"branch": 128 * (k + 1), "time": context, "tokens": n} for k, n in enumerate(own)]
    first = {"visibility": visibility, "context_tokens": context, "branches": branches}
    yield event([choice(k, "") for k in left], pos2d=first)
    count = step = 0
    while left:
        step += 1
        if step == script.breaks_after:
            return
        await asyncio.sleep(script.pace)
        for k in list(left):
            is_over = k in script.cancelled[name] or not left[k]
            if is_over:
                reason = "length" if script.texts.get(k) is None and k not in script.cancelled[name] else "stop"
                if k in script.cancelled[name]:  # as the rest of a character that was not complete
                    yield event([choice(k, "?") | {"logprobs": None}])
                yield event([choice(k, "", reason)])
                del left[k]
            else:
                count += 1
                yield event([choice(k, left[k].pop(0))])
    total = context * len(own) + sum(own)
    details = {"cached_tokens": context * (len(own) - 1)}
    yield event([], usage={"prompt_tokens": total, "completion_tokens": count, "prompt_tokens_details": details})
    yield "data: [DONE]\n\n"


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve an app on a free port of loopback; its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
