"""The routes that watch the server: ``/health``, ``/ready`` and ``/metrics``."""

from pos2d.runtime.http.lifecycle import Lifecycle
from pos2d.runtime.http.metrics import Metrics
from pos2d.runtime.http.refusals import App, Receive, RefusedError, Scope, Send, send_body, send_json, send_refusal
from pos2d.runtime.serving.engine import Engine


class Probes:
    """Answers the three routes beside the application, also where that one is busy or closing."""

    def __init__(self, app: App, engine: Engine, lifecycle: Lifecycle, metrics: Metrics) -> None:
        self._app = app
        self._engine = engine
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._routes = {"/health": self._health, "/ready": self._ready, "/metrics": self._numbers}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        probe = self._routes.get(scope["path"]) if scope["type"] == "http" else None
        if probe is None:
            await self._app(scope, receive, send)
        elif scope["method"] not in ("GET", "HEAD"):
            await send_refusal(send, RefusedError(405, f"{scope['path']} takes GET"), close=True)
        else:
            await probe(send)

    async def _health(self, send: Send) -> None:
        alive = self._engine.is_alive
        await send_json(send, 200 if alive else 503, {"status": "alive" if alive else "the engine has ended"})

    async def _ready(self, send: Send) -> None:
        if self._lifecycle.is_closing or not self._engine.is_alive:
            await send_json(send, 503, {"status": "closing"}, {"retry-after": "1"})
        else:
            await send_json(send, 200, {"status": "ready"})

    async def _numbers(self, send: Send) -> None:
        body, content_type = self._metrics.text(self._engine.load())
        await send_body(send, 200, body, content_type)
