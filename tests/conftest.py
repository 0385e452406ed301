"""Fixtures: the golden cases as artifacts of every kind, and tiny bases of every family."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

import exporter
import runtime

GOLDENS = Path(__file__).parent / "goldens"
CASES = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())
BACKENDS = ("merged", "onnx")


@dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """One case of the trainer: its input files and what its own code gave for them."""

    path: Path
    facts: dict[str, Any]
    tensors: dict[str, np.ndarray]

    @property
    def flags(self) -> dict[str, Any]:
        """The flags of ``merge`` that belong to this case."""
        positions = {"no_patch_rope": True} if self.facts["ratio"] is None else {"rope_2d_ratio": self.facts["ratio"]}
        return {
            "base_model": self.path / "base",
            "lora": self.path / "lora.pth",
            "branch_stride": self.facts["stride"],
            "align_to": self.facts["align"],
            **positions,
        }


def read_golden(name: str) -> Golden:
    path = GOLDENS / name
    facts = json.loads((path / "golden.json").read_text(encoding="utf-8"))
    return Golden(path, facts, load_file(path / "golden.safetensors"))


@pytest.fixture(scope="session", params=CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return read_golden(request.param)


@pytest.fixture(scope="session")
def artifact_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Golden, str], Path]:
    """The directory of a golden case merged, or merged and exported; each is made once."""
    root = tmp_path_factory.mktemp("artifacts")

    def make(golden: Golden, kind: str) -> Path:
        merged, onnx = root / golden.path.name / "merged", root / golden.path.name / "onnx"
        if not merged.exists():
            exporter.merge(output=merged, **golden.flags)
            exporter.export(merged, onnx, no_verify=True)
        return {"merged": merged, "onnx": onnx}[kind]

    return make


@pytest.fixture(scope="session")
def model_of(artifact_of: Callable[[Golden, str], Path]) -> Callable[[Golden, str], runtime.Model]:
    return lambda golden, kind: runtime.load(artifact_of(golden, kind))


@pytest.fixture(scope="session")
def qwen2() -> Golden:
    return read_golden("qwen2_r050_left")


@pytest.fixture
def call() -> Callable[..., Result]:
    """Run the command line in this process: ``call("merge", "--lora", path)``."""
    from cli import cli

    return lambda *arguments: CliRunner().invoke(cli, [str(argument) for argument in arguments])
