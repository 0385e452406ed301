"""``verify`` passes artifacts that agree and fails others, and ``export`` keeps only artifacts that pass."""

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import Result
from onnx import numpy_helper

from pos2d import exporter, runtime
from pos2d.errors import InputError, ParityError, Pos2DError, UsageError
from pos2d.exporter.artifact.staging import file_facts
from pos2d.exporter.formats.onnx import format as onnx_format
from pos2d.manifest import read_manifest
from pos2d.runtime.evaluation.parity import compare
from tests.conftest import Golden, read_golden

ArtifactOf = Callable[[Golden, str], Path]


def damaged(source: Path, target: Path, initializer: str, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """A copy of an ONNX artifact in which one initialiser has other values in every graph, and the manifest says so."""
    shutil.copytree(source, target)
    manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
    for name in [name for name in manifest["files"] if name.endswith(".onnx")]:
        model = onnx.load(target / name, load_external_data=False)
        (tensor,) = (t for t in model.graph.initializer if t.name == initializer)
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            data = target / place["location"]
            offset, count = int(place["offset"]), int(place["length"]) // 4
            values = np.memmap(data, dtype=np.float32, mode="r+", offset=offset, shape=(count,))
            values[:] = change(values)
            values.flush()
            break
        tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), initializer))
        onnx.save(model, target / name)
    manifest["files"] = {name: facts | file_facts(target)[name] for name, facts in manifest["files"].items()}
    (target / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return target


def test_backends_agree_both_ways(golden: Golden, artifact_of: ArtifactOf) -> None:
    merged, onnx_directory = artifact_of(golden, "merged"), artifact_of(golden, "onnx")
    for artifact, against in ((onnx_directory, merged), (merged, onnx_directory)):
        report = runtime.verify(artifact, against)
        assert report.passed
        assert report.max_abs_diff is not None
        assert 0 < report.max_abs_diff < 1e-4  # of logits up to 4: ten times what float32 gives
        assert report.top1_agreement == 1.0
        assert [case.name for case in report.cases] == [
            "one branch, cached",
            "one branch, one pass",
            "four branches after a context, cached",
            "four branches after a context, one pass",
            "batch of two, cached",
        ]


@pytest.mark.parametrize(
    ("initializer", "change"),
    [
        ("rope_inv_freq", lambda freq: freq * 1.01),
        ("model.norm.weight", lambda weight: weight * np.float32(np.nan)),
    ],
)
def test_wrong_positions_or_weights_fail(
    call: Callable[..., Result],
    qwen2: Golden,
    artifact_of: ArtifactOf,
    tmp_path: Path,
    initializer: str,
    change: Callable[[np.ndarray], np.ndarray],
) -> None:
    broken = damaged(artifact_of(qwen2, "onnx"), tmp_path / "broken", initializer, change)
    result = call("verify", broken, "--against", artifact_of(qwen2, "merged"), "--json")
    assert result.exit_code == 7
    report = json.loads(result.stdout)
    assert report["passed"] is False
    assert not any(case["max_rel_diff"] <= report["rtol"] for case in report["cases"])
    assert "do not use this artifact" in result.stderr


def test_artifacts_of_other_models_are_not_compared(qwen2: Golden, artifact_of: ArtifactOf) -> None:
    other = read_golden("llama_r025_right")
    with pytest.raises(InputError, match="not the same model: family"):
        runtime.verify(artifact_of(qwen2, "onnx"), artifact_of(other, "merged"))


def test_models_with_few_positions_get_shorter_probes(qwen2: Golden, tmp_path: Path) -> None:
    base = shutil.copytree(qwen2.path / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 24}), encoding="utf-8")
    exporter.merge(output=tmp_path / "merged", **{**qwen2.flags, "base_model": base})
    report = runtime.verify(tmp_path / "merged", tmp_path / "merged")
    assert report.passed
    assert [case.positions for case in report.cases] == [10, 10, 15, 15, 20]


def test_a_tolerance_must_be_positive(call: Callable[..., Result], qwen2: Golden, artifact_of: ArtifactOf) -> None:
    merged = artifact_of(qwen2, "merged")
    assert call("verify", merged, "--against", merged, "--rtol", "nan").exit_code == 2


@pytest.mark.parametrize(
    ("differing", "passes"), [([0.005], True), ([0.005, 0.0009], True), ([0.005] * 2, False), ([0.02], False)]
)
def test_a_single_position_may_be_sensitive(differing: list[float], passes: bool) -> None:
    """Positions with massive activations differ more, in any two libraries."""
    expected = np.tile(np.array([20.0, 1.0, 0.0], dtype=np.float32), (40, 1))
    found = expected.copy()
    found[: len(differing), 0] += 20 * np.array(differing, dtype=np.float32)
    assert import_module("pos2d.runtime.verify")._report([compare("case", expected, found)], 1e-3).passed is passes


def test_compare_measures_what_it_says() -> None:
    # Numpy's float32 logarithm may be four units in the last place off.
    expected = np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).astype(np.float32)
    found = np.log([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]).astype(np.float32)
    case = compare("case", expected, found)
    assert case.max_abs_diff == pytest.approx(np.log(2))
    assert case.max_rel_diff == pytest.approx(np.log(2) / np.log(10))
    assert case.other_rel_diff == 0
    assert case.top1_agreement == 0.5
    assert case.mean_kl == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2)


def test_export_writes_the_figures_into_the_manifest(qwen2: Golden, artifact_of: ArtifactOf, tmp_path: Path) -> None:
    report = exporter.export(artifact_of(qwen2, "merged"), tmp_path / "onnx")
    assert report.parity is not None
    assert report.parity["passed"] is True
    assert read_manifest(tmp_path / "onnx").parity == report.parity
    assert read_manifest(artifact_of(qwen2, "onnx")).parity is None


def test_export_keeps_nothing_that_fails_its_check(
    qwen2: Golden, artifact_of: ArtifactOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frequencies = onnx_format._frequencies

    def wrong(source: Any, tied: bool) -> tuple[np.ndarray, float]:
        inv_freq, scaling = frequencies(source, tied)
        return inv_freq * np.float32(1.01), scaling

    monkeypatch.setattr(onnx_format, "_frequencies", wrong)
    with pytest.raises(ParityError, match="does not agree"):
        exporter.export(artifact_of(qwen2, "merged"), tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_breaks_is_a_defect(
    qwen2: Golden, artifact_of: ArtifactOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(Pos2DError, match="verify ended with exit code 1"):
        exporter.export(artifact_of(qwen2, "merged"), tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_artifact_is_not_held_to_the_tolerance_of_exact_ones(
    qwen2: Golden, artifact_of: ArtifactOf
) -> None:
    for pair in (("8bit", "merged"), ("merged", "8bit")):
        with pytest.raises(UsageError, match="`pos2d eval` measures"):
            runtime.verify(*(artifact_of(qwen2, kind) for kind in pair))
