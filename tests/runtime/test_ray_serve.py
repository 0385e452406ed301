"""The server on Ray Serve: its arguments, and what it asks of the cluster; benchmarks/ray_serve.py runs it."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pos2d.errors import UsageError
from pos2d.runtime import ray_serve
from pos2d.runtime.cluster.options import ReplicaOptions


def test_texts_of_the_command_line_get_the_types_of_the_options() -> None:
    given = {"model": "m", "min_replicas": "2", "grace": "1.5", "access_log": "true", "api_key": "k", "context": "7"}
    typed = ray_serve.typed(given)
    assert typed == given | {"min_replicas": 2, "grace": 1.5, "access_log": True, "api_key": ("k",)}
    assert ray_serve.typed(typed | {"allowed_host": ["a", "b"]})["allowed_host"] == ("a", "b")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "give a `model`"),
        ({"model": "m", "port": 80}, "`port` belongs to the proxy of Ray Serve"),
        ({"model": "m", "max_replica": 1}, "no argument 'max_replica'; did you mean 'max_replicas'"),
        ({"model": "m", "max_replicas": "two"}, "`max_replicas` 'two' must be a whole number"),
        ({"model": "m", "access_log": "perhaps"}, "`access_log` 'perhaps' must be true or false"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ray_serve.typed(arguments)


def test_there_are_not_more_replicas_at_least_than_at_most() -> None:
    with pytest.raises(UsageError, match="`max_replicas` 1 is less than `min_replicas` 2"):
        ReplicaOptions(min_replicas=2, max_replicas=1)


@pytest.mark.filterwarnings("ignore")
def test_replicas_grow_with_the_branches_of_an_engine(talking: Path) -> None:
    pytest.importorskip("ray")
    arguments = {"model": str(talking / "onnx"), "threads": "3", "max_replicas": "5", "max_running_branches": "6"}
    deployment: Any = ray_serve.build_app(arguments)._bound_deployment
    assert deployment.ray_actor_options == {"num_cpus": 3, "num_gpus": 0}
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 5, 6)
    assert deployment.max_ongoing_requests == 6 + 16


def test_a_replica_loads_answers_and_ends(talking: Path) -> None:
    """In this process, as Ray Serve calls it."""

    async def live() -> list[dict[str, Any]]:
        replica = ray_serve.Replica()
        await replica.start({"model": str(talking / "onnx"), "threads": 1})
        await replica.check_health()
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/health", "headers": [], "query_string": b""}
        await replica.routes(scope, receive, send)
        await replica.close()
        with pytest.raises(RuntimeError, match="the engine has ended"):
            await replica.check_health()
        return sent

    sent = asyncio.run(live())
    assert sent[0]["status"] == 200
