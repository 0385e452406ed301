"""``verify`` notices every change of an artifact: of a file, of the manifest, and of graphs whose hashes are right."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from transformers import LlamaConfig

from pos2d import exporter, runtime
from pos2d.errors import InputError, ParityError
from pos2d.exporter.artifact.staging import file_facts
from pos2d.manifest import read_manifest
from tests.bases import SHAPE, linear_modules, random_adapter, write_adapter, write_base, write_tokenizer

Change = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``merged``, ``bnb`` and ``onnx``: one model with a tokenizer, the last in 8 bits and checked."""
    root = tmp_path_factory.mktemp("made")
    # Heads of a multiple of eight values, so that there are all three graphs.
    base = write_base(root / "base", LlamaConfig(**{**SHAPE, "hidden_size": 64, "initializer_range": 0.5}))
    write_tokenizer(base)
    inputs: dict[str, Any] = {"base_model": base, "rope_2d_ratio": 1.0}
    inputs["lora"] = write_adapter(root / "lora.pth", random_adapter(linear_modules(base)))
    exporter.merge(output=root / "merged", **inputs)
    exporter.export(None, root / "bnb", format="bnb", quant="8bit", **inputs)
    exporter.export(None, root / "onnx", quant="int8", **inputs)
    return root


def copied(made: Path, kind: str, target: Path) -> Path:
    return Path(shutil.copytree(made / kind, target / kind, dirs_exist_ok=True))


def with_new_hashes(directory: Path) -> Path:
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"] = {name: facts | file_facts(directory)[name] for name, facts in manifest["files"].items()}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return directory


@pytest.mark.parametrize("kind", ["merged", "bnb", "onnx"])
def test_every_file_is_compared(made: Path, kind: str, tmp_path: Path) -> None:
    assert runtime.verify(made / kind).passed
    directory = copied(made, kind, tmp_path)
    for name, facts in read_manifest(directory).checked_files.items():
        whole = (directory / name).read_bytes()
        changed = bytearray(whole)
        changed[len(whole) * 2 // 3] ^= 0x10
        (directory / name).write_bytes(changed)
        assert len(changed) == facts["bytes"]
        with pytest.raises(InputError, match=f"{name} .*changed after the artifact was written"):
            runtime.verify(directory)
        (directory / name).write_bytes(whole)


@pytest.mark.parametrize("kind", ["merged", "onnx"])
@pytest.mark.parametrize(
    "edit",
    [
        {"rope_2d": {"branch_stride": 64}},
        {"rope_2d": {"align_to": "right"}},
        {"rope_2d": {"visibility": "isolated"}},
        {"context_length": 256},
        {"eos_token_ids": [7]},
    ],
    ids=str,
)
def test_an_edited_manifest_is_refused(made: Path, kind: str, edit: dict[str, Any], tmp_path: Path) -> None:
    directory = copied(made, kind, tmp_path)
    path = directory / "manifest.json"
    block = json.loads(path.read_text(encoding="utf-8"))
    for key, value in edit.items():
        block[key] = block[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(block), encoding="utf-8")
    ((field, value),) = edit.items()
    key = next(iter(value)) if field == "rope_2d" else field
    if field == "eos_token_ids" and kind == "merged":
        with pytest.raises(InputError, match="eos_token_ids differ"):
            runtime.verify(directory, made / kind)
        return
    with pytest.raises(InputError, match=key):
        runtime.verify(directory)
    if field == "rope_2d":  # every other command would compute something else, in silence
        with pytest.raises(InputError, match=key):
            runtime.load(directory).generate_ids([[1], [2]], max_new_tokens=2)


def in_graphs(*names: str) -> Callable[[Change], Callable[[Path], None]]:
    """A change of these graphs, as a change of a directory."""

    def of(change: Change) -> Callable[[Path], None]:
        def apply(directory: Path) -> None:
            for name in names:
                model = onnx.load(directory / name, load_external_data=False)
                change(model)
                (directory / name).write_bytes(model.SerializeToString())

        return apply

    return of


ALL = ("model.onnx", "model_causal.onnx", "model_batch.onnx")


def rewritten(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))


@in_graphs(*ALL)
def swapped_axes(model: onnx.ModelProto) -> None:
    rewritten(model, "rope_axes", lambda axes: np.where(axes == 0, 0, 3 - axes))


@in_graphs(*ALL)
def fast_frequencies(model: onnx.ModelProto) -> None:
    rewritten(model, "rope_inv_freq", lambda f: np.where(np.arange(len(f)) >= len(f) // 2, 8 * f, f).astype(f.dtype))


@in_graphs("model_batch.onnx")
def other_scale(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type in ("GroupQueryAttention", "Attention"):
            kept = [attribute for attribute in node.attribute if attribute.name != "scale"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("scale", 1.0)])


def high_bits(directory: Path) -> None:
    data = np.memmap(directory / "model.onnx.data", dtype=np.uint8, mode="r+")
    data[len(data) // 2 :][:256] ^= 0x80
    data.flush()


@pytest.mark.parametrize("change", [swapped_axes, fast_frequencies, other_scale, high_bits])
def test_graphs_are_held_against_the_exact_model(made: Path, change: Callable[[Path], None], tmp_path: Path) -> None:
    """Also where the hashes are those of the changed files, as after a defect of the export itself."""
    directory = copied(made, "onnx", tmp_path)
    change(directory)
    with_new_hashes(directory)
    with pytest.raises((InputError, ParityError), match=r"not the model that was exported|has axes"):
        runtime.verify(directory).raise_if_failed()


def test_the_report_has_the_distance_of_every_graph(made: Path) -> None:
    exact = runtime.verify(made / "onnx").exact
    assert exact is not None
    assert exact.is_text
    assert [case.name for case in exact.cases] == ["one branch", "four branches after a context", "both in one batch"]
    recorded = (read_manifest(made / "onnx").parity or {})["exact"]
    assert exact.mean_kl == pytest.approx(recorded["mean_kl"], rel=0.1)
    assert recorded["max_mean_kl"] > exact.max_mean_kl, "which the export recorded"


@pytest.mark.parametrize("key", ["eos_token_ids", "context_length", "tokenizer.json"])
def test_a_reference_has_the_same_settings(made: Path, key: str, tmp_path: Path) -> None:
    directory = copied(made, "merged", tmp_path)
    path = directory / "manifest.json"
    block = json.loads(path.read_text(encoding="utf-8"))
    if key == "tokenizer.json":
        content = (directory / key).read_bytes()
        (directory / key).write_bytes(content.replace(b'"1.0"', b'"1.1"', 1))
    else:
        block[key] = [7] if key == "eos_token_ids" else 100
    path.write_text(json.dumps(block), encoding="utf-8")
    with pytest.raises(InputError, match=f"not the same model: {key} differ"):
        runtime.verify(made / "merged", directory)
