"""Threads share one loaded model: every answer is the one that it has alone."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pos2d import runtime
from pos2d.runtime.backends.onnx.sessions import OnnxGraphs

# Branches of each job: two branches and a batch each need a more general graph than one branch does.
JOBS = ([[1, 2, 3]], [[9], [8, 7]], [[4, 5]], [[6], [5], [4]])


@pytest.fixture
def slow_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait between the choice of a session and its binding, so that threads meet there."""
    bind: Callable[..., Any] = OnnxGraphs.binding

    def slow(graphs: OnnxGraphs, cache: Any) -> Any:
        time.sleep(0.002)
        return bind(graphs, cache)

    monkeypatch.setattr(OnnxGraphs, "binding", slow)


@pytest.mark.usefixtures("slow_bindings")
@pytest.mark.parametrize("kind", ["merged", "onnx"])
def test_threads_get_the_answers_that_each_has_alone(talking: Path, kind: str) -> None:
    def answer(model: runtime.Model, branches: list[list[int]]) -> list[list[int]]:
        return model.generate_ids(branches, max_new_tokens=12, ignore_eos=True)

    alone = [answer(runtime.load(talking / kind), branches) for branches in JOBS]
    shared = runtime.load(talking / kind)
    with ThreadPoolExecutor(len(JOBS)) as threads:
        together = list(threads.map(lambda branches: answer(shared, branches), JOBS))
    assert together == alone


@pytest.mark.usefixtures("slow_bindings")
@pytest.mark.parametrize("kind", ["merged", "onnx"])
def test_agenerate_runs_beside_generate(talking: Path, kind: str) -> None:
    texts = [["tea"], ["a cat", "a dog"]]
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0, "ignore_chat_template": True}
    alone = [runtime.load(talking / kind).generate(prompts, **options) for prompts in texts]
    shared = runtime.load(talking / kind)

    async def both() -> tuple[Any, Any]:
        beside = asyncio.to_thread(shared.generate, texts[1], **options)
        return await asyncio.gather(shared.agenerate(texts[0], **options), beside)

    assert [[one.text for one in answers] for answers in asyncio.run(both())] == [
        [one.text for one in answers] for answers in alone
    ]
