"""``threads``: every backend computes with as many as were asked for, and the answers stay the same."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pos2d import runtime
from pos2d.runtime.backends.onnx.backend import OnnxBackend


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_torch_gets_the_number(talking: Path) -> None:
    runtime.load(talking / "merged", threads=1)
    assert torch.get_num_threads() == 1
    runtime.load(talking / "merged", threads=2)
    assert torch.get_num_threads() == 2


def test_a_quota_lowers_the_number_and_never_raises_it(talking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    monkeypatch.setattr("pos2d.threads.cpu_quota", lambda: 1.0)
    runtime.load(talking / "merged")
    assert torch.get_num_threads() == 1
    monkeypatch.setattr("pos2d.threads.cpu_quota", lambda: 8.0)
    runtime.load(talking / "merged")
    assert torch.get_num_threads() == 1


def test_onnx_sessions_get_the_number(talking: Path) -> None:
    model = runtime.load(talking / "onnx", threads=1)
    assert isinstance(model.backend, OnnxBackend)
    _, session = model.backend.graphs.session("causal")
    assert session.get_session_options().intra_op_num_threads == 1


@pytest.mark.parametrize("kind", ["merged", "onnx"])
def test_answers_are_the_same(talking: Path, kind: str) -> None:
    one, two = (runtime.load(talking / kind, threads=count).generate("Hello", max_new_tokens=8) for count in (1, 2))
    assert one == two
