"""Fixtures: the golden cases as artifacts of every kind, and tiny bases of every family."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from pos2d import exporter, runtime
from pos2d.bnb_format import BnbQuant
from tests.bases import CONFIGS, linear_modules, random_adapter, write_adapter, write_base, write_tokenizer

GOLDENS = Path(__file__).parent / "goldens"
CASES = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())
BACKENDS = ("merged", "onnx")
QUANTS: dict[str, BnbQuant] = {name: name for name in get_args(BnbQuant)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests of the documentation, which run longest, so that no worker is left with them at the end."""
    items.sort(key=lambda item: "docs" not in item.path.parts)


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
    """The directory of a golden case as ``merged``, ``onnx``, ``8bit`` or ``nf4``; each is made once."""
    root = tmp_path_factory.mktemp("artifacts")

    def make(golden: Golden, kind: str) -> Path:
        path = root / golden.path.name / kind
        if path.exists():
            return path
        if kind == "merged":
            exporter.merge(output=path, **golden.flags)
        elif kind == "onnx":
            exporter.export(make(golden, "merged"), path, no_verify=True)
        else:
            # The golden models have MLPs of sizes that nf4 does not take.
            skipped = "lm_head" if kind == "8bit" else "lm_head,gate_proj,up_proj,down_proj"
            options: Any = {"format": "bnb", "quant": QUANTS[kind], "skip_modules": skipped, "dtype": "float32"}
            exporter.export(None, path, **options, **golden.flags)
        return path

    return make


@pytest.fixture(scope="session")
def model_of(artifact_of: Callable[[Golden, str], Path]) -> Callable[..., runtime.Model]:
    """Loads it, with the flags of :func:`pos2d.runtime.load`."""
    return lambda golden, kind, **flags: runtime.load(artifact_of(golden, kind), **flags)


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``merged`` and ``onnx``: a tiny model with a tokenizer of bytes and a chat template."""
    root = tmp_path_factory.mktemp("talking")
    base = write_base(root / "base", CONFIGS["llama"])
    write_tokenizer(base, chat=True)
    lora = write_adapter(root / "lora.pth", random_adapter(linear_modules(base)))
    exporter.merge(base, lora, root / "merged")
    exporter.export(root / "merged", root / "onnx", no_verify=True)
    return root


@pytest.fixture(scope="session", params=BACKENDS)
def talker(request: pytest.FixtureRequest, talking: Path) -> runtime.Model:
    """That model, on either backend."""
    return runtime.load(talking / request.param)


@pytest.fixture(scope="session")
def qwen2() -> Golden:
    return read_golden("qwen2_r050_left")


@pytest.fixture
def call() -> Callable[..., Result]:
    """Run the command line in this process: ``call("merge", "--lora", path)``."""
    from pos2d.commands.main import cli

    return lambda *arguments: CliRunner().invoke(cli, [str(argument) for argument in arguments])
