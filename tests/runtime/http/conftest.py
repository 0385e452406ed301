"""A server over the tiny model, in a thread of this process, and the clients that drive it."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from fastapi import FastAPI

from pos2d import runtime
from pos2d.runtime.http.app import create_app
from pos2d.runtime.http.limits import Limits
from pos2d.runtime.http.options import ServeOptions
from pos2d.runtime.http.settings import ServerSettings
from pos2d.runtime.serving.engine import Engine


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))


def limits_of(engine: Engine, **options: Any) -> Limits:
    chosen = ServeOptions(**options)
    return Limits.of(chosen, engine.artifact.manifest.context_length, engine.kv_budget)


@dataclass(frozen=True, slots=True, eq=False)
class Server:
    """A running server: its application, its address, and the model and engine behind it."""

    app: FastAPI
    url: str
    model: runtime.Model
    engine: Engine

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def server(talking: Path) -> Iterator[Server]:
    model = runtime.load(talking / "onnx")
    engine = Engine(model)
    app = create_app(engine, ServerSettings(model="tiny", limits=limits_of(engine, max_request_branches=8)))
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    yield Server(app, f"http://127.0.0.1:{port}", model, engine)
    running.should_exit = True
    thread.join()
    engine.close()


@pytest.fixture(scope="session")
def engine(talking: Path) -> Iterator[Engine]:
    """An engine over the tiny model, for the tests of the guards."""
    engine = Engine(runtime.load(talking / "onnx"))
    yield engine
    engine.close()


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client
