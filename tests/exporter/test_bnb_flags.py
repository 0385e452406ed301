"""Options of a quantised export and of loading: their effects, and the combinations that are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file

from pos2d import exporter, runtime
from pos2d.errors import InputError, StorageError, UsageError
from pos2d.manifest import read_manifest
from pos2d.recipes import BnbRecipe
from tests.bases import CONFIGS, linear_modules, random_adapter, weights, write_adapter, write_base, write_tokenizer
from tests.conftest import Golden

ArtifactOf = Callable[[Golden, str], Path]
Call = Callable[..., Result]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base whose head is its embedding, and an adapter of it."""
    root = tmp_path_factory.mktemp("tied")
    base = write_base(root / "base", CONFIGS["llama"])
    write_tokenizer(base)
    return base, write_adapter(root / "lora.pth", random_adapter(linear_modules(base)))


def export8(tied: tuple[Path, Path], output: Path, **flags: Any) -> exporter.ExportReport:
    return exporter.export(None, output, format="bnb", quant="8bit", base_model=tied[0], lora=tied[1], **flags)


def int8_modules(directory: Path) -> set[str]:
    return {name.removesuffix(".SCB") for name in weights(directory) if name.endswith(".SCB")}


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("lm_head", {"lm_head"}),
        ("lm_head,down_proj", {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}),
        ("lm_head model.layers.1.mlp.up_proj", {"lm_head", "model.layers.1.mlp.up_proj"}),
        ("", set()),
    ],
)
def test_skipped_modules_keep_their_type(tied: tuple[Path, Path], skip: str, left: set[str], tmp_path: Path) -> None:
    export8(tied, tmp_path / "out", skip_modules=skip)
    everything = {*linear_modules(tied[0]), "lm_head"}
    assert int8_modules(tmp_path / "out") == everything - left
    assert set(read_manifest(tmp_path / "out").quant.skip_modules) == left  # type: ignore[union-attr]
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert set(config["quantization_config"]["llm_int8_skip_modules"]) == left
    assert config["tie_word_embeddings"] is ("lm_head" in left)
    ids = [[5, 6, 7, 8]]
    exporter.merge(*tied, tmp_path / "merged")
    expected = runtime.load(tmp_path / "merged", device="cpu").logits(ids)
    found = runtime.load(tmp_path / "out", device="cpu", dtype="float32").logits(ids)
    assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_a_whole_decoder_layer_can_be_skipped(tied: tuple[Path, Path], tmp_path: Path) -> None:
    export8(tied, tmp_path / "out", skip_modules="lm_head,model.layers.1")
    assert all(name.startswith("model.layers.0.") for name in int8_modules(tmp_path / "out"))


def test_shards_hold_the_same_tensors(tied: tuple[Path, Path], tmp_path: Path) -> None:
    export8(tied, tmp_path / "one")
    export8(tied, tmp_path / "several", max_shard_size="20KB", dtype="bfloat16")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    one, several = weights(tmp_path / "one"), weights(tmp_path / "several")
    assert set(one) == set(several)
    assert all(torch.equal(tensor.to(several[name].dtype), several[name]) for name, tensor in one.items())
    assert {str(t.dtype) for t in several.values()} == {f"torch.{n}" for n in ("int8", "uint8", "float32", "bfloat16")}
    assert runtime.load(tmp_path / "several").manifest.dtype == "bfloat16"


def test_reports_say_how_the_artifact_is_quantised(tied: tuple[Path, Path], tmp_path: Path, call: Call) -> None:
    arguments = ("--base-model", tied[0], "--lora", tied[1], "--format", "bnb", "--quant", "8bit", "-o", tmp_path / "q")
    done = call("export", *arguments)
    assert done.exit_code == 0, done.stderr
    assert "bnb 8bit" in done.stdout
    assert "14 of 20 tensors quantised" in done.stdout
    shown = call("inspect", tmp_path / "q")
    assert "8bit, but for lm_head" in shown.stdout
    answered = call("run", tmp_path / "q", "-p", "hello", "-p", "you", "-n", "4", "--json", "--device", "cpu")
    assert answered.exit_code == 0, answered.stderr
    assert json.loads(answered.stdout)["new_tokens"] > 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--format", "bnb"], "needs --quant 8bit or nf4"),
        (["--format", "bnb", "--quant", "8bit", "--skip-modules", "head"], "head names no linear layer"),
        (["--format", "bnb", "--quant", "8bit", "--max-shard-size", "big"], "cannot be read"),
        (["--format", "bnb", "--quant", "8bit", "--skip-modules", "model,lm_head"], "leaves nothing to quantise"),
        (["--format", "bnb", "--quant", "8bit", "--no-verify"], "belongs to --format onnx"),
        (["--format", "bnb", "--quant", "8bit", "--lora", "x.pth"], "belong to --base-model"),
        (["--format", "bnb", "--quant", "8bit", "--rope-2d-ratio", "1.0"], "stores its positions"),
        (["--format", "bnb", "--quant", "8bit", "--lora-rank", "3"], "belong to --base-model"),
        (["--lora", "x.pth"], "belong to --base-model"),
        (["--quant", "8bit"], "takes --quant int8, int4, auto"),
        (["--dtype", "bfloat16"], "takes --dtype float32 or float16"),
        (["--skip-modules", "down_proj"], "belong to --quant"),
        (["--max-shard-size", "1GB"], "belongs to --format bnb"),
    ],
)
def test_flags_that_contradict(
    qwen2: Golden, artifact_of: ArtifactOf, flags: list[str], sentence: str, tmp_path: Path, call: Call
) -> None:
    done = call("export", artifact_of(qwen2, "merged"), "-o", tmp_path / "out", *flags)
    assert done.exit_code == 2, done.output
    assert sentence in done.stderr
    assert not list(tmp_path.iterdir())


def test_exactly_one_source_must_be_given(tied: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="either a model, or `base_model`"):
        exporter.export(None, tmp_path / "out", format="bnb", quant="8bit")
    with pytest.raises(UsageError, match="either a model, or `base_model`"):
        exporter.export(tied[0], tmp_path / "out", format="bnb", quant="8bit", base_model=tied[0], lora=tied[1])
    with pytest.raises(UsageError, match="at least one `lora`"):
        exporter.merge(tied[0], [], tmp_path / "out")
    with pytest.raises(UsageError, match="`output` is missing"):
        exporter.export(tied[0])


def test_nf4_is_refused_for_shapes_that_it_computes_wrongly(
    qwen2: Golden, artifact_of: ArtifactOf, tmp_path: Path
) -> None:
    merged = artifact_of(qwen2, "merged")
    with pytest.raises(InputError, match="multiples of 64 inputs"):
        exporter.export(merged, tmp_path / "out", format="bnb", quant="nf4")
    with pytest.raises(InputError, match="multiples of 64 inputs"):
        runtime.load(merged, quant="nf4", device="cpu")
    BnbRecipe("8bit").check({"any": (7, 5)})


def test_values_that_are_not_finite(tied: tuple[Path, Path], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", CONFIGS["llama"])
    tensors = weights(base)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight has NaN"):
        exporter.export(None, tmp_path / "out", format="bnb", quant="8bit", base_model=base, lora=tied[1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_files_that_do_not_fit(tied: tuple[Path, Path], damage: str, tmp_path: Path) -> None:
    export8(tied, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = weights(tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj"
    if damage == "missing":
        del tensors[f"{name}.SCB"]
    elif damage == "unknown":
        tensors["extra"] = torch.zeros(1)
    else:
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"][:-1].clone()
    save_file(tensors, file)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"][file.name]["bytes"] = file.stat().st_size
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(InputError, match="make the artifact again"):
        runtime.load(tmp_path / "out", device="cpu")


def test_loading_flags_that_contradict(qwen2: Golden, artifact_of: ArtifactOf) -> None:
    merged, onnx, int8 = (artifact_of(qwen2, kind) for kind in ("merged", "onnx", "8bit"))
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (int8, {"quant": "nf4"}, "is quantised to 8bit"),
        (onnx, {"quant": "8bit"}, "is an ONNX artifact"),
        (onnx, {"int8_kernel": "bnb"}, "is an ONNX artifact"),
        (merged, {"int8_kernel": "bnb"}, "is for 8 bits"),
        (merged, {"quant": "4bit"}, "is not one of 8bit, nf4"),
        (merged, {"int8_kernel": "fast"}, "is not one of auto, bnb, weight-only"),
        (merged, {"attn_implementation": "flash_attention_2"}, "columns need a mask of their own"),
        (merged, {"max_memory": "0=1GB"}, "`device_map='auto'`"),
        (merged, {"device_map": "auto", "device": "cpu"}, "give one of the two"),
        (merged, {"device_map": "auto", "max_memory": "cpu:1GB"}, "such as 0=8GB"),
        (merged, {"device_map": "auto", "max_memory": "cpu=lots"}, "such as 0=8GB"),
    ]
    for path, flags, sentence in cases:
        with pytest.raises(UsageError, match=sentence):
            runtime.load(path, **flags)


def test_layers_are_spread_over_what_there_is(qwen2: Golden, artifact_of: ArtifactOf) -> None:
    for kind, quant in (("merged", None), ("8bit", None), ("nf4", None), ("merged", "8bit")):
        flags: Any = {} if quant is None else {"quant": quant}
        alone = runtime.load(artifact_of(qwen2, kind), device="cpu", **flags).logits([[5, 6, 7]])
        spread = runtime.load(artifact_of(qwen2, kind), device_map="auto", max_memory="cpu=1GB", **flags)
        if not torch.cuda.is_available():
            np.testing.assert_array_equal(spread.logits([[5, 6, 7]]), alone)
    with pytest.raises(StorageError, match="fit no device"):
        runtime.load(artifact_of(qwen2, "8bit"), device_map="auto", max_memory="cpu=50KB")


def test_a_disk_that_is_too_small(tied: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match="its disk has"):
        export8(tied, tmp_path / "out")
    assert not list(tmp_path.iterdir())
