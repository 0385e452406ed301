"""Models that were never merged: plain ones, and a base with adapters that are added while it is loaded."""

import gc
import json
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from click.testing import Result
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from pos2d import exporter, runtime
from pos2d.errors import InputError, OutputError, UsageError
from pos2d.manifest import read_manifest
from pos2d.runtime.backends.torch import loading
from pos2d.sources.files import tensor_io
from pos2d.sources.files.tensor_places import TensorPlace
from tests.bases import CONFIGS, linear_modules, weights, write_base, write_tokenizer

PROMPTS = ["one question", "and another", "x"]


def parameters(model: runtime.Model) -> dict[str, torch.Tensor]:
    backend: Any = model.backend
    return dict(backend._model.state_dict())


def assert_same_parameters(one: runtime.Model, other: runtime.Model) -> None:
    left, right = parameters(one), parameters(other)
    assert set(left) == set(right)
    for name, value in left.items():
        assert value.dtype == right[name].dtype
        assert torch.equal(value, right[name]), name


def exact(report: runtime.ParityReport) -> bool:
    """Whether the same weights gave the same logits; a batch adds up in another order than one sequence."""
    *alone, batch = report.cases
    return report.passed and all(case.max_abs_diff == 0 for case in alone) and batch.max_abs_diff < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_a_plain_model_has_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", CONFIGS[name])
    ids = np.random.default_rng(3).integers(0, 300, (2, 40))
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(base).eval()(torch.from_numpy(ids)).logits.numpy()
    found = runtime.load(base, device="cpu").logits(ids)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("positions", [{"rope_2d_ratio": 0.5}, {"no_patch_rope": True}])
@pytest.mark.parametrize("loading", [{}, {"dtype": "bfloat16"}])
def test_adding_in_memory_is_merging(
    talking: Path, tmp_path: Path, positions: dict[str, Any], loading: dict[str, Any]
) -> None:
    exporter.merge(talking / "base", talking / "lora.pth", tmp_path / "merged", **positions, **loading)
    in_memory = runtime.load(
        base_model=talking / "base", lora=talking / "lora.pth", device="cpu", **positions, **loading
    )
    written = runtime.load(tmp_path / "merged", device="cpu")
    assert_same_parameters(in_memory, written)
    assert in_memory.manifest.rope_2d == written.manifest.rope_2d
    options: dict[str, Any] = {"max_new_tokens": 6}
    assert in_memory.generate(PROMPTS, **options) == written.generate(PROMPTS, **options)


def test_quantising_while_loading_quantises_the_exact_sum(talking: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"base_model": talking / "base", "lora": talking / "lora.pth", "rope_2d_ratio": 0.5}
    exporter.export(None, tmp_path / "bnb", format="bnb", quant="8bit", dtype="float32", **options)
    exact, stored = (
        runtime.load(*where, device="cpu", dtype="float32", int8_kernel="bnb", **how)
        for where, how in (((), {**options, "quant": "8bit"}), ((tmp_path / "bnb",), {}))
    )
    assert_same_parameters(exact, stored)


def test_prompts_of_a_plain_model_do_not_see_each_other(talking: Path) -> None:
    model = runtime.load(talking / "base", device="cpu")
    assert model.manifest.rope_2d.visibility == "isolated"
    together = [answer.text for answer in model.generate(PROMPTS, max_new_tokens=8)]
    assert together == [model.generate(prompt, max_new_tokens=8)[0].text for prompt in PROMPTS]


def test_a_graph_of_a_plain_model_is_held_against_it(talking: Path, tmp_path: Path) -> None:
    report = exporter.export(talking / "base", tmp_path / "onnx")
    assert report.parity is not None
    assert report.parity["max_rel_diff"] < 1e-4
    assert exporter.export(base_model=talking / "base", output=tmp_path / "again", no_verify=True).bytes > 0
    for name in read_manifest(tmp_path / "onnx").graph.files:  # type: ignore[union-attr]
        assert (tmp_path / "onnx" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_model_that_was_merged_elsewhere_can_be_the_reference(talking: Path, tmp_path: Path) -> None:
    exporter.merge(talking / "base", talking / "lora.pth", tmp_path / "merged", no_patch_rope=True)
    shutil.copytree(tmp_path / "merged", tmp_path / "elsewhere", ignore=shutil.ignore_patterns("manifest.json"))
    report = runtime.verify(tmp_path / "merged", tmp_path / "elsewhere")
    assert report.passed
    assert exact(report)
    assert not runtime.verify(tmp_path / "merged", talking / "base").passed


def test_pickled_weights_are_read_too(talking: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(talking / "base", old, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(weights(talking / "base"), old / "pytorch_model.bin")
    assert_same_parameters(runtime.load(old, device="cpu"), runtime.load(talking / "base", device="cpu"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs the memory map of Linux")
def test_a_pickle_is_not_held_beside_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_io, "MAPPED_BYTES", 1 << 20)
    values = {str(number): torch.full((256, 1024), float(number)) for number in range(16)}
    torch.save(values, tmp_path / "pytorch_model.bin")
    file = tensor_io.open_tensors(tmp_path / "pytorch_model.bin")
    for name, expected in values.items():
        found = torch.empty_like(expected)
        talking = TensorPlace("pytorch_model.bin", tuple(expected.shape), "F32")
        file.read_into(name, talking, 0, found.reshape(-1).view(torch.uint8).numpy().data)
        assert torch.equal(found, expected)
        maps = psutil.Process().memory_maps(grouped=False)
        assert sum(entry.rss for entry in maps if entry.path.endswith("pytorch_model.bin")) < 4 << 20
    file.close()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries have no such call")
def test_weights_that_were_quantised_are_returned_to_the_system(
    talking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed = [[torch.ones(25_000), bytes(100)] for _ in range(1000)]  # 100 MB, with something small behind each
    rss = psutil.Process().memory_info().rss
    for pair in freed:
        del pair[0]
    loading.return_freed_memory()
    assert psutil.Process().memory_info().rss < rss - 80e6
    returned: list[None] = []
    monkeypatch.setattr(loading, "return_freed_memory", lambda: returned.append(None))
    runtime.load(talking / "base", device="cpu", quant="8bit")
    assert len(returned) == len(linear_modules(talking / "base"))


@pytest.mark.parametrize("name", ["own", "base"])
def test_the_tokenizer_of_an_adapter_is_used_and_removed(name: str, talking: Path, tmp_path: Path) -> None:
    own = tmp_path / name
    own.mkdir()
    write_tokenizer(own, chat=False, special=["<extra>"])
    options: dict[str, Any] = {"base_model": talking / "base", "lora": talking / "lora.pth", "tokenizer": own}
    model = runtime.load(**options, rope_2d_ratio=0.5, device="cpu")
    assert model.tokenizer.convert_tokens_to_ids("<extra>") == 256
    assert model.generate("text", max_new_tokens=2)[0].token_ids
    temporary = model.path
    assert temporary.is_dir()
    del model
    gc.collect()
    assert not temporary.exists()


def test_a_plain_model_may_get_another_tokenizer(talking: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    write_tokenizer(own, special=["<extra>"])
    report = exporter.export(None, tmp_path / "onnx", base_model=talking / "base", tokenizer=own)
    assert report.parity is None, "the base has another tokenizer, so that it is not the same model"
    assert runtime.load(tmp_path / "onnx").tokenizer.convert_tokens_to_ids("<extra>") == 256


def without_tokenizer_json(talking: Path, target: Path) -> Path:
    """The base, with its tokenizer in the files that a class of transformers reads, as older models have it."""
    shutil.copytree(talking / "base", target, ignore=shutil.ignore_patterns("tokenizer*"))
    vocabulary = json.loads((talking / "base" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    (target / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (target / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    settings = json.dumps({"tokenizer_class": "Qwen2Tokenizer"})
    (target / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    return target


def test_a_tokenizer_is_converted_as_it_is_for_a_merge(talking: Path, tmp_path: Path) -> None:
    old = without_tokenizer_json(talking, tmp_path / "old")
    exporter.export(old, tmp_path / "onnx", no_verify=True)
    model, graph = runtime.load(old, device="cpu"), runtime.load(tmp_path / "onnx")
    assert model.tokenizer.backend_tokenizer.to_str() == graph.tokenizer.backend_tokenizer.to_str()
    assert model.generate(PROMPTS, max_new_tokens=3) == graph.generate(PROMPTS, max_new_tokens=3)
    assert runtime.verify(tmp_path / "onnx", old).passed
    (tmp_path / "in.txt").write_text("a\nb\n", encoding="utf-8")
    paths = (old, tmp_path / "in.txt", tmp_path / "out.jsonl")
    assert [runtime.batch(*paths, max_new_tokens=3).resumed for _ in range(2)] == [0, 2]


def test_a_tokenizer_that_cannot_be_converted_is_named(
    talking: Path, tmp_path: Path, call: Callable[..., Result]
) -> None:
    old = without_tokenizer_json(talking, tmp_path / "old")
    (old / "vocab.json").rename(old / "tokenizer.model")
    edited = json.dumps({"tokenizer_class": "LlamaTokenizer"})
    (old / "tokenizer_config.json").write_text(edited, encoding="utf-8")
    done = call("run", old, "--prompt", "a")
    assert done.exit_code == 3, done.output
    assert f"the tokenizer in {old} cannot be read" in done.stderr


@pytest.mark.parametrize("unused", [{"branch_stride": 64}, {"align_to": "right"}])
def test_stride_and_alignment_are_nothing_to_compare_without_2d_rope(
    talking: Path, tmp_path: Path, unused: dict[str, Any]
) -> None:
    exporter.export(talking / "base", tmp_path / "stock", format="stock", no_patch_rope=True, no_verify=True, **unused)
    assert runtime.verify(tmp_path / "stock", talking / "base").passed


@pytest.fixture
def with_vocabulary(talking: Path, tmp_path: Path) -> Path:
    """A plain model whose tokenizer is a vocabulary and its merges."""
    model = tmp_path / "vocabulary"
    shutil.copytree(talking / "base", model)
    vocabulary = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    (model / "tokenizer.json").unlink()
    (model / "vocab.json").write_text(json.dumps(vocabulary | {"he": 256}), encoding="utf-8")
    (model / "merges.txt").write_text("#version: 0.2\nh e\n", encoding="utf-8")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}', encoding="utf-8")
    return model


@pytest.mark.parametrize("declared", ["GPT2Tokenizer", "LlamaTokenizer"])
def test_a_vocabulary_and_merges_are_read_as_a_merge_writes_them(
    declared: str, talking: Path, with_vocabulary: Path, tmp_path: Path
) -> None:
    settings = json.dumps({"tokenizer_class": declared})
    (with_vocabulary / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    exporter.merge(with_vocabulary, talking / "lora.pth", tmp_path / "merged", no_patch_rope=True)
    merged, model = (runtime.load(path, device="cpu") for path in (tmp_path / "merged", with_vocabulary))
    assert model.tokenizer("the heat").input_ids == merged.tokenizer("the heat").input_ids
    with pytest.raises(UsageError, match="vocabulary does not have"):  # and not a temporary directory
        runtime.load(with_vocabulary, device="cpu", int8_kernel="bnb")


def test_a_tokenizer_that_cannot_be_read_is_named(talking: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(talking / "base", model)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"not a model")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}', encoding="utf-8")
    with pytest.warns(UserWarning, match="no tokenizer.json"):
        loaded = runtime.load(model, device="cpu")
    assert loaded.generate_ids([[1, 2]], max_new_tokens=1)
    with pytest.raises(InputError, match="save_pretrained") as refused:
        loaded.generate("a")
    assert "`" not in str(refused.value)


def test_a_default_that_may_be_wrong_is_said_in_python_too(talking: Path) -> None:
    with pytest.warns(UserWarning, match="no positions were given"):
        runtime.load(base_model=talking / "base", lora=talking / "lora.pth", device="cpu")


def test_a_tokenizer_that_was_saved_by_a_training_is_the_same(talking: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(talking / "base", model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(model / "tokenizer.json"))
    assert exact(runtime.verify(model, talking / "base"))
    tokenizer.add_tokens(["another"])
    tokenizer.save(str(model / "tokenizer.json"))
    with pytest.raises(InputError, match=r"not the same model: tokenizer\.json"):
        runtime.verify(model, talking / "base")


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({}, UsageError, "either a model"),
        ({"path": "base", "base_model": "base"}, UsageError, "either a model"),
        ({"path": "base", "lora": "lora.pth"}, UsageError, "belong to `base_model`"),
        ({"path": "base", "revision": "main"}, UsageError, "belong to `base_model`"),
        ({"base_model": "base", "lora_rank": 8}, UsageError, "belong to `lora`"),
        ({"path": "base", "branch_stride": 64}, UsageError, "belong to 2D RoPE"),
        ({"path": ""}, UsageError, "name of the model is empty"),
        ({"path": "nowhere/at/all"}, InputError, "nowhere/at/all does not exist"),
        ({"path": "lora.pth"}, InputError, "lora.pth is a file of weights"),
    ],
)
def test_what_cannot_be_opened(
    arguments: dict[str, Any],
    kind: type[Exception],
    message: str,
    talking: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(talking)
    with pytest.raises(kind, match=message):
        runtime.load(**arguments)


def test_an_artifact_keeps_its_positions(talking: Path, tmp_path: Path) -> None:
    exporter.merge(talking / "base", talking / "lora.pth", tmp_path / "merged", rope_2d_ratio=0.5)
    with pytest.raises(UsageError, match="stores its positions"):
        runtime.load(tmp_path / "merged", rope_2d_ratio=1.0)
    (tmp_path / "merged" / "manifest.json").unlink()
    with pytest.raises(InputError, match="no manifest"):
        runtime.load(tmp_path / "merged")


def test_a_plain_model_may_have_2d_positions(talking: Path, tmp_path: Path) -> None:
    given = runtime.load(talking / "base", rope_2d_ratio=0.5, device="cpu")
    assert given.manifest.rope_2d.visibility == "columnar"
    assert len(given.manifest.rope_2d.pair_indices) == 3
    for kind in ("onnx", "stock"):
        report = exporter.export(talking / "base", tmp_path / kind, format=kind, rope_2d_ratio=0.5)
        assert report.parity is None, "the base itself has other positions"


def test_run_says_what_was_decided(talking: Path, call: Callable[..., Result]) -> None:
    base = ("--base-model", talking / "base", "--lora", talking / "lora.pth")
    flags = ("--prompt", "a", "--max-new-tokens", "2")
    guessed = call("run", *base, *flags)
    assert guessed.exit_code == 0, guessed.output
    assert "warning: no positions were given" in guessed.stderr
    assert "--no-patch-rope" in guessed.stderr
    told = call("run", *base, "--no-patch-rope", *flags)
    assert "warning" not in told.stderr
    assert call("run", talking / "base", *flags).exit_code == 0
    assert call("run", *flags).exit_code == 2


def add_key(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | keys), encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        lambda model: (model / "model.safetensors").touch(),
        lambda model: add_key(model / "config.json", rms_norm_eps=1e-5),
        lambda model: add_key(model / "generation_config.json", eos_token_id=[2, 3]),
    ],
)
def test_a_batch_of_a_plain_model_is_continued_only_if_it_is_the_same(
    change: Callable[[Path], None], with_vocabulary: Path, tmp_path: Path
) -> None:
    model = with_vocabulary
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8")
    paths = (model, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert runtime.batch(*paths, max_new_tokens=3).resumed == 0
    assert runtime.batch(*paths, max_new_tokens=3).resumed == 2
    change(model)
    with pytest.raises(OutputError, match="another artifact"):
        runtime.batch(*paths, max_new_tokens=3)
    assert len([json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]) == 2
