"""The proof that a merge carries: every figure against an independent computation from the files."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from pos2d import exporter
from pos2d.commands.merge import ledger_table
from pos2d.exporter.merging.ledger import TensorEntry, total
from pos2d.manifest import read_manifest
from pos2d.sources.tensors.stats import DeltaStats
from tests.bases import CONFIGS, linear_modules, random_adapter, square, write_adapter, write_base
from tests.bounds import gamma


def half_base(directory: Path) -> Path:
    """A base in bfloat16, whose steps a small change must fight."""
    base = write_base(directory, CONFIGS["qwen2 with linear rope"])
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base


def scaled_adapter(base: Path, path: Path, scale: float) -> Path:
    adapter = random_adapter(square(linear_modules(base)))
    return write_adapter(path, {n: tensor * (scale if ".B." in n else 1) for n, tensor in adapter.items()})


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def test_every_tensor_has_its_source_hashes_and_figures(tmp_path: Path) -> None:
    base = half_base(tmp_path / "base")
    lora = scaled_adapter(base, tmp_path / "lora.pth", 0.01)
    report = exporter.merge(base, lora, tmp_path / "merged")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    adapter = torch.load(lora, weights_only=True)
    assert report.ledger is not None
    assert set(report.ledger) == set(after)
    for name, entry in report.ledger.items():
        assert (entry.file, entry.elements) == ("model.safetensors", after[name].numel())
        assert (entry.sha256_in, entry.sha256_out) == (digest(before[name]), digest(after[name]))
        module = name.removesuffix(".weight")
        if f"{module}.lora.A.weight" not in adapter:
            assert (entry.action, entry.sources, entry.retention) == ("copied", ("model.safetensors",), None)
            continue
        old, new = before[name].double().numpy(), after[name].double().numpy()
        b, a = (adapter[f"{module}.lora.{letter}.weight"].double().numpy() for letter in "BA")
        delta, size = b @ a, np.abs(b) @ np.abs(a)
        assert (entry.action, entry.rank, entry.sources) == ("merged", 4, ("model.safetensors", "lora.pth"))
        expected = {
            "rms_weight": np.sqrt(np.mean(old**2)),
            "rms_delta": np.sqrt(np.mean(delta**2)),
            "delta_ratio": np.sqrt(np.mean(delta**2)) / np.sqrt(np.mean(old**2)),
            "retention": np.sum((new - old) * delta) / np.sum(delta**2),
            "error": np.sqrt(np.mean((new - old - delta) ** 2) / np.mean(delta**2)),
            "changed": np.mean(new != old),
        }
        # Two computations, of at most four sums each, which are off by the more the more of their terms cancel out.
        kept = (np.abs(new - old) * size).sum() / np.abs(((new - old) * delta).sum())
        cancelled = max(kept, *(np.linalg.norm(size) / np.linalg.norm(part) for part in (delta, new - old - delta)))
        bound = 8 * gamma(new.size, torch.float64) * cancelled
        for figure, value in expected.items():
            assert getattr(entry, figure) == pytest.approx(value, rel=bound), figure
        assert 0 < expected["retention"] < 0.99
        assert 0 < expected["changed"] < 1


def test_the_manifest_and_the_report_say_the_same(tmp_path: Path, call: Callable[..., Result]) -> None:
    base = half_base(tmp_path / "base")
    lora = scaled_adapter(base, tmp_path / "lora.pth", 0.01)
    done = call("merge", "--base-model", base, "--lora", lora, "-o", tmp_path / "merged", "--json")
    said = json.loads(done.stdout)
    manifest = read_manifest(tmp_path / "merged")
    assert manifest.ledger is not None
    assert said["totals"] == manifest.ledger["totals"]
    entries = {name: TensorEntry.from_dict(entry) for name, entry in manifest.ledger["tensors"].items()}
    assert {name: TensorEntry.from_dict(entry) for name, entry in said["ledger"].items()} == entries
    assert "sha256" not in manifest.files["model.safetensors"]
    assert len(manifest.files["config.json"]["sha256"]) == 64


def test_totals_are_those_of_one_large_tensor() -> None:
    draw = np.random.default_rng(0)
    pieces = [(draw.normal(size=n), draw.normal(size=n) * 0.01, draw.normal(size=n) * 0.01) for n in (50, 9, 200)]
    entries = []
    for weight, delta, moved in pieces:
        dots = ((weight, weight), (delta, delta), (moved, delta))
        squares = [float(a @ b) for a, b in dots]
        error = float(((moved - delta) ** 2).sum())
        tally = DeltaStats(len(weight), squares[0], squares[1], squares[2], error, int((moved > 0).sum()))
        entries.append(TensorEntry("f", "merged", (), len(weight), "", "", rank=2, **tally.figures()))
    weight, delta, moved = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    untouched = TensorEntry("f", "copied", (), 1000, "", "")
    totals = total([*entries, untouched])
    assert (totals.tensors, totals.merged, totals.copied, totals.elements) == (4, 3, 1, 1259)
    # As above; here the terms are exact.
    bound = 8 * gamma(len(delta), torch.float64) * float(np.abs(moved) @ np.abs(delta) / np.abs(moved @ delta))
    assert totals.retention == pytest.approx(moved @ delta / (delta @ delta), rel=bound)
    assert totals.delta_ratio == pytest.approx(np.sqrt((delta @ delta) / (weight @ weight)), rel=bound)
    assert totals.error == pytest.approx(np.sqrt(((moved - delta) ** 2).sum() / (delta @ delta)), rel=bound)
    assert totals.changed == pytest.approx((moved > 0).mean(), rel=bound)


@pytest.mark.parametrize("cure", [("--dtype", "float32"), ("--rounding", "stochastic"), ()])
def test_a_swallowed_adapter_is_named_with_its_cure(
    tmp_path: Path, call: Callable[..., Result], cure: tuple[str, ...]
) -> None:
    base = half_base(tmp_path / "base")
    lora = scaled_adapter(base, tmp_path / "lora.pth", 0.003)
    named = ("--base-model", base, "--lora", lora, "--rope-2d-ratio", "0.5")
    done = call("merge", *named, "-o", tmp_path / "merged", *cure)
    assert done.exit_code == 0
    if cure:
        assert done.stderr == ""
    else:
        assert "warning: bfloat16 retains only" in done.stderr
        assert "--dtype float32 or float16, or --rounding stochastic" in done.stderr


def test_an_adapter_that_was_never_trained_is_named(tmp_path: Path, call: Callable[..., Result]) -> None:
    base = half_base(tmp_path / "base")
    lora = scaled_adapter(base, tmp_path / "lora.pth", 0.0)
    done = call("merge", "--base-model", base, "--lora", lora, "-o", tmp_path / "merged")
    assert "changes nothing in 4 of 4 tensors (model.layers.0.self_attn.o_proj.weight is the first)" in done.stderr
    assert "retention" in done.stdout


def test_stochastic_rounding_is_reproducible_and_independent_of_shards(tmp_path: Path) -> None:
    base = half_base(tmp_path / "base")
    lora = scaled_adapter(base, tmp_path / "lora.pth", 0.003)
    merged: dict[str, dict[str, torch.Tensor]] = {}
    for name, seed, size in (("a", 0, None), ("b", 0, None), ("shards", 0, "40KB"), ("seed", 1, None)):
        exporter.merge(base, lora, tmp_path / name, rounding="stochastic", seed=seed, max_shard_size=size)
        files = (tmp_path / name).glob("*.safetensors")
        merged[name] = {key: tensor for file in files for key, tensor in load_file(file).items()}
    for name, same in (("b", True), ("shards", True), ("seed", False)):
        assert all(torch.equal(merged["a"][key], merged[name][key]) for key in merged["a"]) is same
    options = read_manifest(tmp_path / "seed").options
    assert options["rounding"] == {"mode": "stochastic", "seed": 1}


def test_the_table_has_a_line_for_each_kind() -> None:
    figures = DeltaStats(4, 4.0, 0.04, 0.02, 0.01, 1).figures()
    entries = {
        f"model.layers.{n}.self_attn.{kind}.weight": TensorEntry("f", "merged", (), 4, "", "", rank=8, **figures)
        for n in range(2)
        for kind in ("q_proj", "o_proj")
    }
    lines = ledger_table(entries | {"model.norm.weight": TensorEntry("f", "copied", (), 4, "", "")}).splitlines()
    assert [line.split()[0] for line in lines] == ["module", "o_proj", "q_proj", "all"]
    assert lines[-1].split() == ["all", "4", "8", "1.00e-01", "50.0%", "0.5", "25.0%"]
    assert ledger_table({"model.norm.weight": TensorEntry("f", "copied", (), 4, "", "")}) == ""
