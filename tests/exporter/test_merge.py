"""The laws of a merge, and what it writes."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pos2d import exporter
from pos2d.errors import InputError, UsageError
from pos2d.manifest import read_manifest
from tests.bases import CONFIGS, linear_modules, random_adapter, square, weights, write_adapter, write_base
from tests.bounds import rounded_once, sum_bound
from tests.conftest import Golden
from tests.sources.test_rounding import nearest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), CONFIGS["qwen2 with linear rope"])


def float64_sum(weight: torch.Tensor, adapter: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    return weight.double() + adapter[f"{module}.lora.B.weight"].double() @ adapter[f"{module}.lora.A.weight"].double()


def slack(weight: torch.Tensor, adapter: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """How far two such sums may be apart: ours has the scale and the weight in it as well."""
    rank = len(adapter[f"{module}.lora.A.weight"])
    magnitude = float64_sum(weight.abs(), {name: tensor.abs() for name, tensor in adapter.items()}, module)
    return sum_bound(2 * (rank + 3), torch.float64, magnitude)


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16", "bfloat16"])
def test_merged_weights_are_the_float64_sum_rounded_once(base: Path, tmp_path: Path, dtype: str) -> None:
    adapter = {name: tensor.bfloat16() for name, tensor in random_adapter(linear_modules(base)).items()}
    exporter.merge(base, write_adapter(tmp_path / "lora.pth", adapter), tmp_path / "merged", dtype=dtype)
    before, after = weights(base), weights(tmp_path / "merged")
    target = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert set(after) == set(before)
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        assert after[name].dtype == target
        if f"{module}.lora.A.weight" in adapter:
            exact, wrong = float64_sum(weight, adapter, module), slack(weight, adapter, module)
            assert rounded_once(after[name], exact, wrong, partial(nearest, dtype=target)), name
            assert not torch.equal(after[name].float(), weight)
        else:
            torch.testing.assert_close(after[name], nearest(weight.double(), target), rtol=0, atol=0)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_auto_keeps_the_type_of_the_base_and_rounds_only_the_sum(base: Path, tmp_path: Path, stored: str) -> None:
    """A change rounded by itself, before it is added, would be another number."""
    half = shutil.copytree(base, tmp_path / "half")
    dtype = getattr(torch, stored)
    before = {name: tensor.to(dtype) for name, tensor in weights(base).items()}
    save_file(before, half / "model.safetensors")
    adapter = random_adapter(square(linear_modules(base)))
    report = exporter.merge(half, write_adapter(tmp_path / "lora.pth", adapter), tmp_path / "merged")
    assert report.dtype == read_manifest(tmp_path / "merged").dtype == stored
    assert json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))["dtype"] == stored
    after = weights(tmp_path / "merged")
    for module in {name.split(".lora.")[0] for name in adapter}:
        weight = before[f"{module}.weight"]
        exact, found = float64_sum(weight, adapter, module), after[f"{module}.weight"]
        assert found.dtype == dtype
        assert rounded_once(found, exact, slack(weight, adapter, module), partial(nearest, dtype=dtype)), module
        delta = adapter[f"{module}.lora.B.weight"] @ adapter[f"{module}.lora.A.weight"]
        assert not torch.equal(found, weight + delta.to(dtype))


def test_a_merge_without_changes_of_type_or_shards_leaves_the_files_of_transformers(base: Path, tmp_path: Path) -> None:
    """Header, order and bytes are those that the safetensors library writes, so untouched parts stay what they were."""
    adapter = random_adapter(square(linear_modules(base)))
    exporter.merge(base, write_adapter(tmp_path / "lora.pth", adapter), tmp_path / "merged")
    merged = weights(tmp_path / "merged")
    save_file(merged, tmp_path / "library.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


def test_a_sharded_base_gives_the_same_tensors_in_the_same_shards(base: Path, tmp_path: Path) -> None:
    sharded = write_base(tmp_path / "sharded", CONFIGS["qwen2 with linear rope"], max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    lora = write_adapter(tmp_path / "lora.pth", random_adapter(square(linear_modules(base))))
    exporter.merge(base, lora, tmp_path / "single")
    exporter.merge(sharded, lora, tmp_path / "several", dtype="bfloat16")
    exporter.merge(sharded, lora, tmp_path / "exact")
    single, several, exact = (weights(tmp_path / name) for name in ("single", "several", "exact"))
    assert {name: t.shape for name, t in single.items()} == {name: t.shape for name, t in several.items()}
    assert all(torch.equal(single[name], exact[name]) for name in single)
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"]) == set(single)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in several.values())


def test_the_directory_holds_exactly_what_its_manifest_names(qwen2: Golden, tmp_path: Path) -> None:
    report = exporter.merge(output=tmp_path / "merged", **qwen2.flags)
    manifest = read_manifest(tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {*manifest.files, "manifest.json"}
    assert {"config.json", "model.safetensors", "modeling_pos2d.py", "configuration_pos2d.py"} < names
    assert (manifest.kind, manifest.dtype, manifest.eos_token_ids) == ("merged", "float32", (2,))
    assert report.totals is not None
    assert report.totals.merged == manifest.adapters[0]["tensors"] == 4
    assert list(tmp_path.iterdir()) == [tmp_path / "merged"]


def test_config_carries_our_type_and_the_resolved_positions(qwen2: Golden, tmp_path: Path) -> None:
    exporter.merge(output=tmp_path / "merged", **qwen2.flags)
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "pos2d_qwen2"
    assert config["rope_2d"]["pair_indices"] == [5, 6, 7, 8]
    assert config["rope_2d"]["axes"] == [0, 0, 0, 0, 1, 2, 1, 2]
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_pos2d.Pos2DQwen2ForCausalLM"


def test_visibility_follows_the_positions(qwen2: Golden, tmp_path: Path) -> None:
    flags = {**qwen2.flags, "rope_2d_ratio": None}
    exporter.merge(output=tmp_path / "two", **flags)
    exporter.merge(output=tmp_path / "one", no_patch_rope=True, **flags)
    assert read_manifest(tmp_path / "two").rope_2d.visibility == "columnar"
    assert read_manifest(tmp_path / "one").rope_2d.visibility == "isolated"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapper_prefixes_are_dropped(qwen2: Golden, tmp_path: Path, prefix: str) -> None:
    adapter = torch.load(qwen2.path / "lora.pth", weights_only=True)
    wrapped = write_adapter(tmp_path / "lora.pth", {prefix + name: tensor for name, tensor in adapter.items()})
    exporter.merge(output=tmp_path / "plain", **qwen2.flags)
    exporter.merge(output=tmp_path / "wrapped", **{**qwen2.flags, "lora": wrapped})
    plain, unwrapped = weights(tmp_path / "plain"), weights(tmp_path / "wrapped")
    assert all(torch.equal(plain[name], unwrapped[name]) for name in plain)


def test_an_adapter_directory_and_a_base_from_the_hub(qwen2: Golden, tmp_path: Path) -> None:
    """The Hub's own client finds the base in its cache, here without a network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "hub" / "models--someone--tiny"
    shutil.copytree(qwen2.path / "base", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    (tmp_path / "adapter").mkdir()
    shutil.copyfile(qwen2.path / "lora.pth", tmp_path / "adapter" / "final.pth")
    command = [
        "merge",
        "--base-model",
        "someone/tiny",
        "--lora",
        str(tmp_path / "adapter"),
        "-o",
        str(tmp_path / "out"),
    ]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, str(ROOT / "cli.py"), *command], check=True, env=environment, capture_output=True)
    exporter.merge(output=tmp_path / "local", **{**qwen2.flags, "align_to": "left"})
    local, hub = weights(tmp_path / "local"), weights(tmp_path / "out")
    assert all(torch.equal(local[name], hub[name]) for name in local)
    named = read_manifest(tmp_path / "out").base
    assert (named["name"], named["revision"]) == ("someone/tiny", commit)

    for revision, code in ((commit, 0), ("main", 0), ("of-another-day", 3)):
        pinned = [*command[:-1], str(tmp_path / revision), "--revision", revision]
        done = subprocess.run(
            [sys.executable, str(ROOT / "cli.py"), *pinned],
            check=False,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        if code == 0:
            assert read_manifest(tmp_path / revision).base["revision"] == commit


def test_a_tied_head_is_not_written_twice(base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    tensors = weights(copy)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, copy / "model.safetensors")
    lora = write_adapter(tmp_path / "lora.pth", random_adapter(square(linear_modules(base))))
    exporter.merge(copy, lora, tmp_path / "merged")
    assert "lm_head.weight" not in weights(tmp_path / "merged")


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(base: Path, tmp_path: Path) -> None:
    """One release of transformers takes the embedding for both, another loads them as they are."""
    copy = shutil.copytree(base, tmp_path / "base")
    tensors = weights(copy)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, copy / "model.safetensors")
    lora = write_adapter(tmp_path / "lora.pth", random_adapter(square(linear_modules(base))))
    with pytest.raises(InputError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        exporter.merge(copy, lora, tmp_path / "merged")


def test_values_that_a_type_cannot_hold_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = random_adapter(square(linear_modules(base)))
    adapter = {name: tensor * (1e4 if ".B." in name else 1) for name, tensor in adapter.items()}
    lora = write_adapter(tmp_path / "lora.pth", {name: tensor * 10 for name, tensor in adapter.items()})
    with pytest.raises(InputError, match=r"tensor model\.layers\.0.*float16"):
        exporter.merge(base, lora, tmp_path / "merged", dtype="float16")
    assert not (tmp_path / "merged").exists()
    exporter.merge(base, lora, tmp_path / "merged", dtype="bfloat16")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"eos_token_id": [3, 4]}, (3, 4)), ({"eos_token_id": 5}, (5,)), ({}, (2,)), (None, (2,))],
)
def test_end_tokens_are_those_of_the_generation_settings(
    qwen2: Golden, tmp_path: Path, settings: dict[str, object] | None, expected: tuple[int, ...]
) -> None:
    base = shutil.copytree(qwen2.path / "base", tmp_path / "base")
    (base / "generation_config.json").unlink()
    if settings is not None:
        (base / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    exporter.merge(output=tmp_path / "merged", **{**qwen2.flags, "base_model": base})
    assert read_manifest(tmp_path / "merged").eos_token_ids == expected


def test_contradicting_flags_are_a_usage_error(qwen2: Golden, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exclude one another"):
        exporter.merge(output=tmp_path / "merged", no_patch_rope=True, **qwen2.flags)


def test_positions_that_nobody_named_are_said(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", CONFIGS["llama"])
    lora = write_adapter(tmp_path / "lora.pth", random_adapter(square(linear_modules(base))))
    (said,) = exporter.merge(base, lora, tmp_path / "taken").warnings
    assert "`rope_2d_ratio=0.5`, is used" in said
    assert exporter.merge(base, lora, tmp_path / "named", rope_2d_ratio=0.5).warnings == ()
    assert exporter.merge(base, lora, tmp_path / "none", no_patch_rope=True).warnings == ()
    report = exporter.export(None, tmp_path / "int8", format="bnb", quant="8bit", base_model=base, lora=lora)
    assert report.warnings == (said,)


@pytest.mark.parametrize("nothing", [(), [], ""])
def test_empty_pair_indices_are_not_the_default_ratio(qwen2: Golden, tmp_path: Path, nothing: object) -> None:
    with pytest.raises(InputError, match="pair indices are empty"):
        exporter.merge(qwen2.path / "base", qwen2.path / "lora.pth", tmp_path / "out", pair_indices=nothing)
    assert list(tmp_path.iterdir()) == []
