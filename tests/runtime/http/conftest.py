"""A server over the tiny model, in a thread of this process, and the clients that drive it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from fastapi import FastAPI

from pos2d import runtime
from pos2d.runtime.http.app import create_app
from pos2d.runtime.http.settings import ServerSettings
from pos2d.runtime.serving.engine import Engine
from tests.runtime.http.servers import listening, services_of


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))


@dataclass(frozen=True, slots=True, eq=False)
class Server:
    """A running server: its application, its address, the engine behind it, and OpenAI's client."""

    app: FastAPI
    url: str
    engine: Engine
    client: openai.OpenAI

    @property
    def model(self) -> Any:
        """The artifact of the engine, which :func:`pos2d.load` gave."""
        return self.engine.artifact


@pytest.fixture(scope="session")
def engine(talking: Path) -> Iterator[Engine]:
    """An engine over the tiny model, which all tests share."""
    engine = Engine(runtime.load(talking / "onnx"))
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def server(engine: Engine) -> Iterator[Server]:
    """All routes behind all guards, with the process for templates."""
    services = services_of(engine, max_request_branches=8)
    app = create_app(engine, ServerSettings(model="tiny"), services)
    with listening(app, engine, services) as (url, _), httpx2.Client(timeout=30, verify=False) as plain:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=plain)
        yield Server(app, url, engine, client)


@pytest.fixture
def http(server: Server) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=30, verify=False) as client:  # reads no certificates
        yield client
