"""Whatever form base and adapter come in, the merged tensors are the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pos2d import exporter, runtime
from pos2d.errors import InputError, UnsafeInputError, UsageError
from pos2d.manifest import read_manifest
from tests.bases import CONFIGS, linear_modules, random_adapter, square, weights, write_adapter, write_base
from tests.bounds import rounded_once, sum_bound
from tests.commands.test_errors import Payload

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, torch.Tensor]


def same(left: Tensors, right: Tensors) -> bool:
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("tied"), CONFIGS["qwen2 with linear rope"])


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("untied"), CONFIGS["mistral with wide heads"])


@pytest.fixture(scope="module")
def lora(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("lora") / "lora.pth", random_adapter(square(linear_modules(tied))))


@pytest.fixture(scope="module")
def merged(tied: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    output = tmp_path_factory.mktemp("merged") / "out"
    exporter.merge(tied, lora, output)
    return weights(output)


def as_pickles(base: Path, target: Path, files: int) -> Path:
    """The same base as ``torch.save`` files, the older form of checkpoints."""
    shutil.copytree(base, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = weights(base)
    names = sorted(tensors)
    if files == 1:
        # A transposed tensor and a tied head that shares its storage, as such files have them.
        turned = "model.layers.0.mlp.up_proj.weight"
        torch.save(
            tensors | {turned: tensors[turned].T.contiguous().T, HEAD: tensors[EMBEDDING]}, target / "pytorch_model.bin"
        )
        return target
    weight_map = {name: f"pytorch_model-{1 + k % files:05d}-of-{files:05d}.bin" for k, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in names if weight_map[name] == file}, target / file)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return target


@pytest.mark.parametrize("files", [1, 3])
def test_a_base_of_pickles(tied: Path, lora: Path, merged: Tensors, tmp_path: Path, files: int) -> None:
    base = as_pickles(tied, tmp_path / "base", files)
    exporter.merge(base, lora, tmp_path / "out")
    assert same(weights(tmp_path / "out"), merged)
    names = sorted(path.name for path in (tmp_path / "out").glob("*model*safetensors*"))
    shards = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    assert names == (["model.safetensors"] if files == 1 else [*shards, "model.safetensors.index.json"])
    runtime.load(tmp_path / "out").logits([1, 2, 3])


def test_a_base_of_pickles_is_not_run(tied: Path, lora: Path, tmp_path: Path) -> None:
    base = as_pickles(tied, tmp_path / "base", 1)
    torch.save({"a": Payload(tmp_path / "sentinel")}, base / "pytorch_model.bin")
    with pytest.raises(UnsafeInputError, match=r"pytorch_model\.bin would run"):
        exporter.merge(base, lora, tmp_path / "out")
    assert not (tmp_path / "sentinel").exists()
    (base / "pytorch_model.bin").unlink()  # a whole file comes before an index
    index = {"weight_map": {EMBEDDING: "../elsewhere.bin"}}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UnsafeInputError, match=r"\.\./elsewhere\.bin"):
        exporter.merge(base, lora, tmp_path / "out")


@pytest.mark.parametrize(("size", "least"), [("30KB", 4), ("60KB", 2), ("1GB", 1)])
def test_shards_of_a_chosen_size(
    tied: Path, lora: Path, merged: Tensors, tmp_path: Path, size: str, least: int
) -> None:
    exporter.merge(tied, lora, tmp_path / "out", max_shard_size=size)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) >= least
    assert same(weights(tmp_path / "out"), merged)
    largest = max(tensor.nbytes for tensor in merged.values())
    limit = int(size[:-2]) * {"KB": 10**3, "GB": 10**9}[size[-2:]]
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= max(limit, largest) for file in files)
    if least == 1:
        assert files[0].name == "model.safetensors"
        return
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert {name: set(load_file(tmp_path / "out" / file)) >= {name} for name, file in index["weight_map"].items()} == (
        dict.fromkeys(merged, True)
    )


def test_a_size_that_is_none(tied: Path, lora: Path, tmp_path: Path) -> None:
    for size in ("5 apples", "GB", ""):
        with pytest.raises(UsageError, match=r"`max_shard_size` .* give a size such as 8GB"):
            exporter.merge(tied, lora, tmp_path / "out", max_shard_size=size)


def test_a_tensor_in_two_files_is_refused(tied: Path, lora: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tied, tmp_path / "base")
    tensors = weights(base)
    save_file(tensors, base / "one.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"] + 1}, base / "two.safetensors")
    (base / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(tensors, "one.safetensors") | {"model.norm.weight": "two.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(
        InputError, match=r"two\.safetensors: tensor model\.norm\.weight is in one\.safetensors as well"
    ):
        exporter.merge(base, lora, tmp_path / "out")


def test_whole_numbers_are_not_weights(tied: Path, lora: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tied, tmp_path / "base")
    tensors = weights(base)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].long()}, base / "model.safetensors")
    with pytest.raises(InputError, match=r"not floating point model\.norm\.weight I64"):
        exporter.merge(base, lora, tmp_path / "out")


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_the_merged_directory_reloads_strictly(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """No key missing, none unexpected, and every value is what was written."""
    base: Path = request.getfixturevalue(name)
    adapter = random_adapter(linear_modules(base))
    exporter.merge(base, write_adapter(tmp_path / "lora.pth", adapter), tmp_path / "out")
    model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state, written = model.state_dict(), weights(tmp_path / "out")
    assert set(state) - set(written) == ({HEAD} if name == "tied" else set())
    assert all(torch.equal(state[key], tensor) for key, tensor in written.items())


def head_adapter(base: Path, rank: int = 4) -> Tensors:
    """The trainer's form with a change of the head, which is no square layer but a linear one."""
    vocab, hidden = weights(base)[EMBEDDING].shape
    return random_adapter(square(linear_modules(base)) | {"lm_head": (vocab, hidden)}, rank)


def test_a_change_of_a_tied_head_unties_it(tied: Path, tmp_path: Path) -> None:
    """Training computes with the changed head and the unchanged embedding; so must what is loaded."""
    adapter = head_adapter(tied)
    exporter.merge(tied, write_adapter(tmp_path / "lora.pth", adapter), tmp_path / "out")
    before, after = weights(tied), weights(tmp_path / "out")
    assert torch.equal(after[EMBEDDING], before[EMBEDDING])
    b, a = (adapter[f"lm_head.lora.{letter}.weight"].double() for letter in "BA")
    exact, magnitude = before[EMBEDDING].double() + b @ a, before[EMBEDDING].double().abs() + b.abs() @ a.abs()
    slack = sum_bound(2 * (len(a) + 3), torch.float64, magnitude)
    assert rounded_once(after[HEAD], exact, slack, torch.Tensor.float)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is False

    model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys"))
    assert torch.equal(model.lm_head.weight, after[HEAD])
    assert torch.equal(model.model.embed_tokens.weight, after[EMBEDDING])
    exporter.export(tmp_path / "out", tmp_path / "onnx")  # verifies the graph against the untied model


def test_a_whole_state_of_the_trainer(tied: Path, tmp_path: Path) -> None:
    """A full fine-tune has nothing to add: its tensors take the places of the base's."""
    draw = torch.Generator().manual_seed(9)
    trained = {name: tensor + torch.randn(tensor.shape, generator=draw) for name, tensor in weights(tied).items()}
    extra = {HEAD: trained[EMBEDDING], "model.rotary_emb.inv_freq": torch.ones(3)}
    state = {f"module.{name}": tensor for name, tensor in (trained | extra).items()}
    report = exporter.merge(tied, write_adapter(tmp_path / "full.pth", state), tmp_path / "out")
    assert same(weights(tmp_path / "out"), trained)
    assert report.totals is not None
    assert (report.totals.replaced, report.totals.merged) == (len(trained), 0)
    assert report.adapters[0]["form"] == "state dict"
    assert read_manifest(tmp_path / "out").rope_2d.pair_indices

    state[f"module.{HEAD}"] = state[f"module.{HEAD}"] + 1
    with pytest.raises(InputError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        exporter.merge(tied, write_adapter(tmp_path / "torn.pth", state), tmp_path / "no")
    del state["module.model.norm.weight"], state[f"module.{HEAD}"]
    with pytest.raises(InputError, match=r"does not fit .*missing tensors model\.norm\.weight"):
        exporter.merge(tied, write_adapter(tmp_path / "cut.pth", state), tmp_path / "no")


def test_several_adapters_with_weights(tied: Path, tmp_path: Path) -> None:
    modules = square(linear_modules(tied))
    first, second = random_adapter(modules, rank=4, seed=1), random_adapter(modules, rank=2, seed=2)
    paths = [write_adapter(tmp_path / f"{n}.pth", adapter) for n, adapter in enumerate((first, second))]
    exporter.merge(tied, [f"{paths[0]}=0.7", f"{paths[1]}=-0.3"], tmp_path / "out")
    before, after = weights(tied), weights(tmp_path / "out")
    for module in modules:
        exact = before[f"{module}.weight"].double()
        magnitude = exact.abs()
        for adapter, share in ((first, 0.7), (second, -0.3)):
            b, a = (adapter[f"{module}.lora.{letter}.weight"].double() for letter in "BA")
            exact, magnitude = exact + share * (b @ a), magnitude + abs(share) * (b.abs() @ a.abs())
        slack = sum_bound(2 * (4 + 4), torch.float64, magnitude)  # the larger rank, two factors, two additions
        assert rounded_once(after[f"{module}.weight"], exact, slack, torch.Tensor.float), module
    adapters = read_manifest(tmp_path / "out").adapters
    assert [(adapter["file"], adapter["weight"]) for adapter in adapters] == [("0.pth", 0.7), ("1.pth", -0.3)]


def test_weights_on_the_command_line(tied: Path, lora: Path, tmp_path: Path, call: Callable[..., Result]) -> None:
    odd = shutil.copyfile(lora, tmp_path / "a=2")  # a file may be called so
    flags = ("merge", "--base-model", tied, "-o")
    assert call(*flags, tmp_path / "one", "--lora", odd).exit_code == 0
    assert read_manifest(tmp_path / "one").adapters[0]["weight"] == 1.0
    for weight in ("x", "0", "nan", "inf", ""):
        refused = call(*flags, tmp_path / "no", "--lora", f"{lora}={weight}")
        assert (refused.exit_code, "must be a number other than 0" in refused.stderr) == (2, True), weight
    refused = call(*flags, tmp_path / "no", "--lora", lora, "--lora", f"{lora}=0.5")
    assert (refused.exit_code, "give every adapter once" in refused.stderr) == (2, True)


def test_a_revision_is_for_the_hub(tied: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`revision` is for a Hub id"):
        exporter.merge(tied, lora, tmp_path / "out", revision="main")
