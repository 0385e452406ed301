"""Directories and files that are no base for a merge: the sentence says what they are, and what to give."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from pos2d.errors import InputError, UsageError
from pos2d.exporter.inspect import inspect
from pos2d.exporter.plan import plan
from pos2d.manifest import Kind, read_manifest
from pos2d.sources.checkpoints import location
from pos2d.sources.checkpoints.base import read_base
from pos2d.sources.checkpoints.weight_files import OLD_SINGLE
from pos2d.sources.positions import TrainedPositions
from pos2d.sources.sidecars.sidecars import check_sidecars, files_in
from pos2d.sources.source import from_adapters
from tests.bases import CONFIGS, linear_modules, random_adapter, square, write_adapter, write_base, write_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 123\n"
Q = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", CONFIGS["llama with yarn rope"])


def refusal(path: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        read_base(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def set_keys(base: Path, **changes: Any) -> None:
    settings = json.loads((base / "config.json").read_text(encoding="utf-8")) | changes
    (base / "config.json").write_text(json.dumps(settings), encoding="utf-8")


def packed(**parts: torch.Tensor) -> Callable[[Tensors], Tensors]:
    """The weight of one layer in the parts of another format."""
    return lambda tensors: (
        {name: tensor for name, tensor in tensors.items() if name != f"{Q}.weight"}
        | {f"{Q}.{part}": tensor.clone() for part, tensor in parts.items()}
    )


SCALES = torch.ones(48, 2)
INTS = torch.zeros(48, 12, dtype=torch.int32)
QUANTISED: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "GPTQ": ("GPTQ", packed(qweight=INTS, qzeros=INTS, scales=SCALES, g_idx=INTS)),
    "AWQ": ("AWQ", packed(qweight=INTS, qzeros=INTS, scales=SCALES)),
    "8 bits of bitsandbytes": ("bitsandbytes", packed(weight=torch.zeros(48, 48, dtype=torch.int8), SCB=SCALES)),
    "4 bits of bitsandbytes": ("bitsandbytes", packed(weight=torch.zeros(1152, 1, dtype=torch.uint8), absmax=SCALES)),
    "MLX": ("MLX", packed(weight=INTS.to(torch.uint32), scales=SCALES, biases=SCALES)),
    "FP8": ("FP8", packed(weight=torch.zeros(48, 48, dtype=torch.float8_e4m3fn), weight_scale=SCALES)),
    "FP8 in blocks": ("FP8", packed(weight=torch.zeros(48, 48, dtype=torch.float8_e4m3fn), weight_scale_inv=SCALES)),
    "compressed-tensors": ("compressed-tensors", packed(weight_packed=INTS, weight_scale=SCALES, weight_shape=INTS)),
    "int8 of compressed-tensors": (
        "compressed-tensors",
        packed(weight=torch.zeros(48, 48, dtype=torch.int8), weight_scale=SCALES),
    ),
}


@pytest.mark.parametrize("form", QUANTISED)
def test_quantised_tensors_whose_configuration_does_not_say_so(base: Path, form: str) -> None:
    name, change = QUANTISED[form]
    save_file(change(load_file(base / "model.safetensors")), base / "model.safetensors", {"format": "pt"})
    sentence = refusal(base)
    assert f"quantised (its tensors are those of {name}" in sentence or f"GPTQ or {name}" in sentence
    assert "give the unquantised model" in sentence


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"quant_method": "gptq"}),
        ("quantization", {"bits": 4}),
        ("compression_config", {"a": 1}),
    ],
)
def test_quantised_by_the_configuration(base: Path, key: str, value: object) -> None:
    set_keys(base, **{key: value})
    assert f"config.json: the model is quantised ({key}" in refusal(base)
    for nothing in (None, dict[str, Any]()):
        set_keys(base, **{key: nothing})
        assert read_base(base).sizes.layers == 2


def test_settings_of_a_quantiser_beside_plain_weights_mean_nothing(base: Path) -> None:
    (base / "quantize_config.json").write_text('{"bits": 4}', encoding="utf-8")
    assert read_base(base).sizes.layers == 2


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_pointers_of_git_lfs_in_a_base(base: Path, name: str) -> None:
    (base / name).write_text(POINTER, encoding="utf-8")
    assert f"{name} is a Git LFS pointer" in refusal(base)
    assert "git lfs pull" in refusal(base)


def test_pointers_of_git_lfs_elsewhere(base: Path, tmp_path: Path, golden_artifact: Path) -> None:
    write_tokenizer(base)
    (base / "tokenizer.json").write_text(POINTER, encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json is a Git LFS pointer"):
        check_sidecars(files_in(base))
    (tmp_path / "lora.pth").write_text(POINTER, encoding="utf-8")
    with pytest.raises(InputError, match=r"lora\.pth is a Git LFS pointer"):
        inspect(tmp_path / "lora.pth")
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_text(POINTER, encoding="utf-8")
    assert "pytorch_model.bin is a Git LFS pointer" in refusal(base)
    artifact = shutil.copytree(golden_artifact, tmp_path / "artifact")
    (artifact / "model.safetensors").write_text(POINTER, encoding="utf-8")
    with pytest.raises(InputError, match=r"model\.safetensors is a Git LFS pointer"):
        read_manifest(artifact)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_to_files_that_are_missing(base: Path, tmp_path: Path, name: str) -> None:
    """As in a Hub snapshot that was copied without its blobs: no file is taken for one that does not exist."""
    write_tokenizer(base)
    write_adapter(tmp_path / "lora.pth", random_adapter(square(linear_modules(base))))
    (base / name).unlink()
    (base / name).symlink_to(tmp_path / "blobs" / "12")
    with pytest.raises(InputError, match=rf"{name} is a link to a file that is missing; download it again"):
        from_adapters(base, tmp_path / "lora.pth", TrainedPositions(no_patch_rope=True))


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (["model-00001-of-00002.safetensors"], "model.safetensors.index.json, which names them, is missing"),
        (["global_step10/x.pt"], "global_step10 has shards of DeepSpeed"),
        (["pytorch_model_fsdp_0/x.distcp"], "pytorch_model_fsdp_0 has shards of FSDP"),
        (["consolidated.00.pth"], "consolidated.00.pth is in the format of the model's authors"),
        (["model.fp16.safetensors"], "rename it to model.safetensors"),
        (["notes.txt"], "give a directory with weights"),
    ],
)
def test_weights_of_another_name(base: Path, found: list[str], words: str) -> None:
    (base / "model.safetensors").unlink()
    for name in found:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"")
    assert words in refusal(base)


@pytest.fixture
def golden_artifact(qwen2: Any, artifact_of: Callable[..., Path]) -> Path:
    return artifact_of(qwen2, "merged")


def test_empty_tensors(base: Path) -> None:
    tensors = {name: torch.zeros(0) for name in load_file(base / "model.safetensors")}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert "tensors are empty, such as lm_head.weight: DeepSpeed ZeRO-3" in refusal(base)


def test_what_was_given_in_place_of_a_directory(base: Path, tmp_path: Path) -> None:
    assert f"give its directory, {base}" in refusal(base / "model.safetensors")
    (tmp_path / "lora.pth").write_bytes(b"1")
    of_weights = "is a file of weights; give a Hugging Face model directory, or give it as `lora` if it is an adapter"
    assert of_weights in refusal(tmp_path / "lora.pth")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert "is a GGUF file; give the Hugging Face model directory" in refusal(tmp_path / "a.gguf")
    assert f"a model is in {base}; give that directory" in refusal(tmp_path)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "12"
    shutil.copytree(base, snapshot)
    assert f"a model is in {snapshot}" in refusal(snapshot.parents[1])
    (base / "config.json").unlink()
    assert "config.json does not exist; copy it from the repository" in refusal(base)
    (base / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "holds an adapter; give it as `lora`, and the model that it was trained on as `base_model`" in refusal(base)
    (base / "adapter_config.json").unlink()
    (base / "manifest.json").write_text("{}", encoding="utf-8")
    assert "holds an artifact without a model for transformers; give the base" in refusal(base)


@pytest.mark.parametrize(
    ("files", "keys", "words"),
    [
        (["adapter_config.json"], {}, "adapter_config.json, by which transformers loads another base"),
        ([], {"text_config": {"model_type": "llama"}}, "text_config and the keys beside it describe two models"),
        ([], {"model_type": "llava", "text_config": {"model_type": "llama"}}, "'llava' holds a llama"),
    ],
)
def test_directories_from_which_transformers_loads_something_else(
    base: Path, files: list[str], keys: dict[str, Any], words: str
) -> None:
    for name in files:
        (base / name).write_text("{}", encoding="utf-8")
    set_keys(base, **keys)
    assert words.replace("'", "") in refusal(base).replace("'", "")


@pytest.mark.parametrize(
    ("stored", "named", "wanted"),
    [
        (["model.safetensors", "model.safetensors.index.json", "a.safetensors"], None, {"model.safetensors"}),
        (["model.safetensors.index.json", "a.safetensors", "b.safetensors", OLD_SINGLE], None, {"a.safetensors"}),
        ([OLD_SINGLE, "consolidated.00.pth"], None, {OLD_SINGLE}),
        (["model.safetensors", "b.safetensors"], "b.safetensors", {"b.safetensors"}),
        (["model.safetensors", "a.safetensors"], "b.safetensors.index.json", {"a.safetensors"}),
    ],
)
def test_what_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: list[str], named: str | None, wanted: set[str]
) -> None:
    """From a stand-in for the Hub: of weights only those that are loaded, and every file of one commit."""
    import fnmatch

    import huggingface_hub

    snapshot = tmp_path / "7777"
    snapshot.mkdir()
    content = json.dumps({"weight_map": {"x": "a.safetensors"}})
    config = json.dumps({"model_type": "llama", "transformers_weights": named})
    indices = [] if named is None or named in stored else [named]
    hub = [*stored, *indices, "config.json", "tokenizer.json", "original/config.json", "onnx/model.onnx"]
    revisions: list[str | None] = []

    def download(
        name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str] | None
    ) -> str:
        revisions.append(revision)
        for file in hub:
            asked = any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)
            if asked and not any(fnmatch.fnmatch(file, pattern) for pattern in ignore_patterns or []):
                (snapshot / file).parent.mkdir(exist_ok=True)
                (snapshot / file).write_text(content if file.endswith("index.json") else config, encoding="utf-8")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert location.locate("someone/model", "v1") == (snapshot, "7777")
    assert revisions[0] == "v1"
    assert set(revisions[1:]) == {"7777"}
    revisions.clear()
    assert location.locate("someone/model@v1", None) == (snapshot, "7777")
    with pytest.raises(UsageError, match="give one of them"):
        location.locate("someone/model@v1", "v1")
    assert revisions[0] == "v1"
    found = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
    small = {name for name in hub if name.endswith(".json") and "/" not in name}
    assert found == wanted | small


def test_a_manifest_of_another_program_is_named(base: Path) -> None:
    (base / "manifest.json").write_text('{"name": "an app", "icons": []}', encoding="utf-8")
    with pytest.raises(InputError, match=r"manifest\.json: another program wrote this file; move it away"):
        read_manifest(base)


@pytest.mark.parametrize("given", [".", "../base", "../base/", "../base/."])
def test_a_relative_path_has_the_name_of_its_directory(base: Path, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base)
    assert from_adapters(given, (), TrainedPositions()).origin["base"]["name"] == "base"


def test_what_is_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "a@b").mkdir()
    ids = {"gpt2@main": "main", "org/name@v1": "v1", "org/name@refs/pr/1": "refs/pr/1", "org/name@": None}
    for given, revision in ids.items():
        assert location.split_revision(given) == (given.partition("@")[0], revision)
    paths = ("a@b", "./missing@v1", "/missing@v1", "a/b/c@v1", "here@v1", "here/name@v1", "@v1")
    for given in paths:
        assert location.split_revision(given) == (given, None)
        if given != "a@b":
            with pytest.raises(InputError, match=f"^{given} does not exist"):
                location.locate(given, None)
    with pytest.raises(UsageError, match="names a revision, and so does `revision`"):
        location.locate("org/name@v1", "v2")


@pytest.mark.parametrize("quant", [None, {"name": "8bit"}])
@pytest.mark.parametrize("kind", get_args(Kind))
def test_an_artifact_of_the_hub_is_no_plain_model(
    base: Path, kind: str, quant: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for a stock checkpoint, which is a plain model too."""
    (base / "manifest.json").write_text(json.dumps({"kind": kind, "quant": quant}), encoding="utf-8")
    if kind == "onnx":
        (base / "config.json").unlink()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(base))
    if kind == "stock" and quant is None:
        assert inspect("org/name").base is not None
        assert "`base_model` org/name@v1 and `lora`" in plan("org/name@v1").hint
        return
    for read in (inspect, read_base):
        with pytest.raises(InputError, match=rf"^org/name is an artifact of this tool \(kind {kind}\).*download it"):
            read("org/name")
