"""Manifests of older releases are read where that is possible, and refused with the command that makes them again."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pos2d.errors import InputError
from pos2d.manifest import FORMAT_VERSION, Manifest, read_manifest
from tests.conftest import Golden

ArtifactOf = Callable[[Golden, str], Path]


def block_of(directory: Path) -> dict[str, Any]:
    block: dict[str, Any] = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    return block


def test_the_present_format_is_read_as_it_is(qwen2: Golden, artifact_of: ArtifactOf) -> None:
    for kind in ("merged", "onnx", "8bit"):
        directory = artifact_of(qwen2, kind)
        assert json.loads(json.dumps(read_manifest(directory).to_dict())) == block_of(directory)


@pytest.mark.parametrize("kind", ["merged", "8bit"])
def test_torch_artifacts_of_format_3(qwen2: Golden, artifact_of: ArtifactOf, kind: str) -> None:
    block = block_of(artifact_of(qwen2, kind))
    older = {key: value for key, value in block.items() if key != "graph_quant"} | {"format_version": 3}
    assert Manifest.from_dict(older) == Manifest.from_dict(block)


def test_graphs_of_format_4_were_not_calibrated(qwen2: Golden, artifact_of: ArtifactOf) -> None:
    block = block_of(artifact_of(qwen2, "onnx"))
    recipe = {"name": "int4", "block_size": 32, "bits": {"lm_head": 8}, "float_activations": []}
    manifest = Manifest.from_dict(block | {"format_version": 4, "graph_quant": recipe})
    assert manifest.graph_quant is not None
    assert (manifest.graph_quant.calibrated, manifest.format_version) == (False, FORMAT_VERSION)


def test_what_cannot_be_read_is_refused_with_the_command_that_makes_it_again(
    qwen2: Golden, artifact_of: ArtifactOf
) -> None:
    block = block_of(artifact_of(qwen2, "onnx")) | {"format_version": 3}
    with pytest.raises(InputError, match="format version 3") as error:
        Manifest.from_dict(block)
    for words in ("pos2d export --format onnx", "--base-model base", "--lora lora.pth", "--pair-indices", "--align-to"):
        assert words in str(error.value)
    with pytest.raises(InputError, match=r"format version 1 .* pos2d merge .*--no-patch-rope"):
        Manifest.from_dict({"format_version": 1, "kind": "merged", "adapter": {"file": "lora.pth"}})


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, None, "5"])
def test_other_formats(version: object) -> None:
    with pytest.raises(InputError, match="install the release that made the artifact"):
        Manifest.from_dict({"format_version": version})


def test_the_command_has_the_revision_and_the_weights_of_adapters() -> None:
    adapters = [{"file": "my lora.pth", "weight": 0.7}, {"file": "b.pth", "weight": 1.0}]
    block = {
        "format_version": 2,
        "kind": "merged",
        "base": {"name": "org/base", "revision": "abc"},
        "adapters": adapters,
    }
    words = "pos2d merge --base-model org/base --revision abc --lora 'my lora.pth=0.7' --lora b.pth --no-patch-rope"
    with pytest.raises(InputError, match=re.escape(words)):
        Manifest.from_dict(block)


@pytest.mark.parametrize("key", ["inputs", "outputs", "shape"])
def test_a_graph_without_one_of_its_facts_is_refused(qwen2: Golden, artifact_of: ArtifactOf, key: str) -> None:
    block = block_of(artifact_of(qwen2, "onnx"))
    facts = block["graph"]["graphs"]["general"]
    del (facts["inputs"][0] if key == "shape" else facts)[key]
    with pytest.raises(InputError, match="graph: it cannot be read"):
        Manifest.from_dict(block)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("context_length", "512"),
        ("vocab_size", None),
        ("dtype", 7),
        ("eos_token_ids", "x"),
        ("eos_token_ids", ["x"]),
        ("base", "x"),
        ("adapters", {}),
        ("ledger", "x"),
        ("parity", []),
        ("graph", None),
        ("files", {"model.onnx": {"sha256": ""}}),
        ("files", []),
    ],
)
def test_values_of_other_types_are_refused(
    qwen2: Golden, artifact_of: ArtifactOf, tmp_path: Path, key: str, value: object
) -> None:
    block = block_of(artifact_of(qwen2, "onnx")) | {key: value}
    (tmp_path / "manifest.json").write_text(json.dumps(block), encoding="utf-8")
    with pytest.raises(InputError, match=rf"manifest.json: manifest: {key} cannot be read"):
        read_manifest(tmp_path)


def test_a_manifest_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[" * 50000, encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read"):
        read_manifest(tmp_path)
