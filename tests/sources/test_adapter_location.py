"""What is found at a path or on the Hub, and what is said about a path where no adapter can be read."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pos2d import exporter
from pos2d.errors import InputError, UnsafeInputError
from pos2d.sources.adapters import read_adapters, split_weight
from pos2d.sources.adapters.adapter import Adapter
from pos2d.sources.adapters.deltas import exact_sum
from pos2d.sources.checkpoints.base import read_base
from pos2d.sources.checkpoints.checkpoint import Checkpoint
from tests.bases import CONFIGS, linear_modules, random_adapter, square, write_adapter, write_base
from tests.peft_files import CONFIG, HIDDEN, WEIGHTS, Q, write_peft
from tests.sources.test_peft import EMBEDDING, EXACT, HEAD, TIED, UNTIED, weights_of

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return read_base(str(write_base(tmp_path_factory.mktemp("base") / "base", CONFIGS[UNTIED])))


def same(found: Adapter, expected: Adapter) -> bool:
    return set(found.deltas) == set(expected.deltas) and all(
        torch.equal(value, other.tensors()[name])
        for tensor, (delta,) in found.deltas.items()
        for (other,) in [expected.deltas[tensor]]
        for name, value in delta.tensors().items()
    )


def test_a_file_of_a_peft_directory_means_the_directory(base: Checkpoint, tmp_path: Path) -> None:
    [expected] = read_adapters([write_peft(tmp_path / "adapter")], base)
    for name in (CONFIG, WEIGHTS):
        [adapter] = read_adapters([f"{tmp_path / 'adapter' / name}=0.5"], base)
        assert (adapter.weight, adapter.name) == (0.5, "adapter")
        assert same(adapter, expected)
        assert exporter.inspect(tmp_path / "adapter" / name).what == "PEFT LoRA"


def test_an_adapter_in_several_files(base: Checkpoint, tmp_path: Path) -> None:
    [expected] = read_adapters([write_peft(tmp_path / "adapter")], base)
    parts = shutil.copytree(tmp_path / "adapter", tmp_path / "parts")
    tensors = load_file(parts / WEIGHTS)
    (parts / WEIGHTS).unlink()
    places = {}
    for number, name in enumerate(sorted(tensors), 1):
        places[name] = f"adapter_model-0000{number}-of-0000{len(tensors)}.safetensors"
        save_file({name: tensors[name]}, parts / places[name])
    for index in ("model.safetensors.index.json", "adapter_model.safetensors.index.json"):
        (parts / index).write_text(json.dumps({"weight_map": places}), encoding="utf-8")
        [adapter] = read_adapters([parts], base)
        assert same(adapter, expected)
        facts = exporter.inspect(parts).adapter
        assert facts is not None
        assert (facts.parameters, facts.sha256) == (sum(t.numel() for t in tensors.values()), adapter.sha256)
        (parts / index).unlink()
    with pytest.raises(InputError, match=r"adapter_model-00001-of-.* but no adapter_model.safetensors.index.json"):
        read_adapters([parts], base)
    (parts / index).write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}), encoding="utf-8")
    with pytest.raises(UnsafeInputError, match="outside its directory"):
        read_adapters([parts], base)


def write_mlx(path: Path, module: str, rows: int, columns: int, *, dora: bool = False, **parameters: Any) -> Path:
    path.mkdir()
    draw = torch.Generator().manual_seed(3)
    tensors = {
        f"{module}.lora_a": torch.randn(columns, 3, generator=draw),
        f"{module}.lora_b": torch.randn(3, rows, generator=draw),
    }
    if dora:
        tensors[f"{module}.m"] = torch.rand(rows, generator=draw) + 1
    save_file(tensors, path / "adapters.safetensors")
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 3, "scale": 20.0, "dropout": 0.0} | parameters,
    }
    (path / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_mlx(base: Checkpoint, tmp_path: Path, dora: bool) -> None:
    """y = x W^T + scale (x a) b, and rows of the sum rescaled to the lengths m in its DoRA."""
    module = "model.layers.1.mlp.down_proj"
    path = write_mlx(tmp_path / "mlx", module, HIDDEN, 80, dora=dora)
    [adapter] = read_adapters([path], base)
    stored, weight = load_file(path / "adapters.safetensors"), weights_of(base.directory)[f"{module}.weight"]
    expected = weight + 20 * (stored[f"{module}.lora_a"].double() @ stored[f"{module}.lora_b"].double()).T
    if dora:
        expected = expected / expected.norm(dim=1, keepdim=True) * stored[f"{module}.m"].double()[:, None]
    [delta] = adapter.deltas[f"{module}.weight"]
    found = exact_sum(weight, [delta.widened()], slice(0, HIDDEN))[0]
    assert (found - expected).abs().max() < 100 * EXACT
    facts = exporter.inspect(path)
    assert facts.what == "MLX LoRA"
    assert facts.adapter is not None
    assert (facts.adapter.ranks, facts.adapter.scales) == ((3,), (20.0,))
    assert facts.adapter.modules["down_proj"].shapes == ((HIDDEN, 80),)


def test_mlx_uses_a_tied_embedding_as_head_too(tmp_path: Path) -> None:
    tied = read_base(str(write_base(tmp_path / "base", CONFIGS[TIED])))
    path = write_mlx(tmp_path / "mlx", "model.embed_tokens", HIDDEN, 300)
    [adapter] = read_adapters([path], tied)
    stored = load_file(path / "adapters.safetensors")
    for name in (EMBEDDING, HEAD):
        [delta] = adapter.deltas[name]
        added = exact_sum(torch.zeros(300, HIDDEN).double(), [delta.widened()], slice(0, 300))[0]
        expected = 20 * stored["model.embed_tokens.lora_a"].double() @ stored["model.embed_tokens.lora_b"].double()
        assert (added - expected).abs().max() < EXACT


def spoil_mlx(path: Path) -> Path:
    write_mlx(path, Q, HIDDEN, HIDDEN, alpha=16)
    return path


def step_of_mlx(path: Path) -> Path:
    """A directory with what MLX saves during a training, and nothing that it saves at the end."""
    (write_mlx(path, Q, HIDDEN, HIDDEN) / "adapters.safetensors").rename(path / "0000100_adapters.safetensors")
    (path / "0000050_adapters.safetensors").write_bytes(b"")
    return path


def files(*names: str, content: str = "{}") -> Callable[[Path], Path]:
    """Makes a directory with these files."""

    def make(path: Path) -> Path:
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(content, encoding="utf-8")
        return path

    return make


def tensors(*names: str, file: str = "x.safetensors", config: str | None = None) -> Callable[[Path], Path]:
    """Makes one file of safetensors with these names, beside a configuration if one is given."""

    def make(path: Path) -> Path:
        path.mkdir()
        save_file({name: torch.ones(2, 2) for name in names}, path / file)
        if config is not None:
            (path / CONFIG).write_text(config, encoding="utf-8")
        return path / file if config is None else path

    return make


def empty_tensors(path: Path) -> Path:
    return write_peft(path, lambda content: content.update({name: torch.zeros(0) for name in content}))


def pointer(path: Path) -> Path:
    (write_peft(path) / WEIGHTS).write_text(POINTER, encoding="utf-8")
    return path


def broken_link(path: Path) -> Path:
    weights = write_peft(path) / WEIGHTS
    weights.unlink()
    weights.symlink_to(path / "missing")
    return path


def without_config(path: Path) -> Path:
    (write_peft(path) / CONFIG).unlink()
    torch.save({"state": 1}, path / "rng_state.pth")
    return path


SETTINGS = '{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}'
SENTENCES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "weights without a configuration": (without_config, r"adapter_model.safetensors but no adapter_config.json.*copy"),
    "one file without": (lambda path: without_config(path) / WEIGHTS, "but no adapter_config.json"),
    "states of a training": (files("rng_state_0.pth", "optimizer.pt"), "are states of a training"),
    "one state": (lambda path: files("rng_state.pth")(path) / "rng_state.pth", "is a state of a training"),
    "a folder inside": (files("checkpoint-20/adapter_config.json", "checkpoint-100/adapter_config.json"),
                        r"no adapter itself; .*checkpoint-100.*give that folder, such as .*checkpoint-100"),
    "a model with an adapter inside": (files("config.json", "lora/adapter_config.json"), "is a model, .* as .*lora"),
    "a model": (files("config.json"), "is a model, not an adapter"),
    "a pointer": (pointer, "is a Git LFS pointer"),
    "a broken link": (broken_link, "is a link to a file that is missing"),
    "another name": (tensors(Q, file="pytorch_lora_weights.safetensors", config=SETTINGS),
                     "rename pytorch_lora_weights.safetensors to adapter_model.safetensors"),
    "a directory with gguf": (files("lora.gguf"), "lora.gguf is a GGUF file"),
    "empty tensors": (empty_tensors, "4 of 4 tensors are empty.*ZeRO-3"),
    "shards of FSDP": (files(CONFIG, "pytorch_model_fsdp_0/__0_0.distcp", content=SETTINGS),
                       "shards of FSDP: .*merge-weights"),
    "shards of DeepSpeed": (files("global_step5/mp_rank_00_model_states.pt"), "shards of DeepSpeed: .*zero_to_fp32"),
    "kohya": (tensors("lora_unet_down_blocks_0.lora_down.weight"), "kohya"),
    "diffusers": (tensors("unet.down_blocks.0.attn1.to_q.lora_A.weight"), "diffusers"),
    "lycoris": (tensors("lycoris_layers_0.lokr_w1"), "LyCORIS"),
    "factors alone": (tensors(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"), "but not their scale; .*adapter_config"),
    "weights of a model": (tensors(EMBEDDING, file="model.safetensors"), "weights of a model, not of an adapter"),
    "gguf": (lambda path: files("lora.gguf")(path) / "lora.gguf", "is a GGUF file"),
    "mlx with alpha": (spoil_mlx, "MLX's lora_parameters has alpha"),
    "a full fine-tune of mlx": (tensors(EMBEDDING, file="adapters.safetensors", config='{"fine_tune_type": "full"}'),
                                "MLX's fine_tune_type 'full'"),
    "a training of mlx": (step_of_mlx, "but no adapters.safetensors; copy 0000100_adapters.safetensors to that name"),
    "one step of it": (lambda path: step_of_mlx(path) / "0000100_adapters.safetensors",
                       "saved during a training of MLX; copy it, as adapters.safetensors, and adapter_config.json"),
    "another method of peft": (tensors(Q, file=WEIGHTS, config='{"peft_type": "LOKR"}'), "peft_type 'LOKR'"),
    "nothing": (files("notes.txt"), "has 0 .pth files and no adapter_config.json; give one adapter"),
}  # fmt: skip


@pytest.mark.parametrize("case", SENTENCES)
def test_what_is_no_adapter_is_named(base: Checkpoint, tmp_path: Path, case: str) -> None:
    make, sentence = SENTENCES[case]
    path = make(tmp_path / "adapter")
    with pytest.raises(InputError, match=sentence) as caught:
        read_adapters([path], base)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    if not (path / "config.json").is_file() and path.suffix != ".safetensors":
        with pytest.raises(InputError):
            exporter.inspect(path)


VALUES: list[Any] = [
    None,
    "x",
    "(",
    0,
    -1,
    1.5,
    True,
    [],
    ["x"],
    [1, [2]],
    {},
    {"x": 1},
    {"(": None},
    {"q_proj": "x"},
    10**400,
]


def test_no_value_of_a_configuration_crashes(base: Checkpoint, tmp_path: Path) -> None:
    """Each key with values of every type: read, or refused with a sentence."""
    peft, mlx = write_peft(tmp_path / "peft"), write_mlx(tmp_path / "mlx", Q, HIDDEN, HIDDEN)
    for path, more in ((peft, ()), (mlx, ("peft_type",))):
        good = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        changes = [{key: value} for key in (*good, *more) for value in VALUES]
        changes += [{"lora_parameters": {"rank": value, "scale": value}} for value in VALUES]
        for change in changes:
            (path / CONFIG).write_text(json.dumps(good | change), encoding="utf-8")
            for read in (lambda at: read_adapters([at], base), exporter.inspect):
                with suppress(InputError):
                    read(path)


class FakeHub:
    """``snapshot_download`` of a Hub with one repository; ``asked`` has revision and patterns of every call."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache = repository, cache
        self.asked: list[tuple[str | None, list[str]]] = []

    def __call__(
        self, name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str] | None = None
    ) -> str:
        from huggingface_hub.utils._paths import filter_repo_objects

        if name != "someone/adapter":
            raise OSError(f"{name} is not there")
        self.asked.append((revision, allow_patterns))
        names = [path.relative_to(self.repository).as_posix() for path in self.repository.rglob("*") if path.is_file()]
        target = self.cache / "0123abc"
        for wanted in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (target / wanted).parent.mkdir(parents=True, exist_ok=True)
            blob = self.cache / f"blob of {wanted.replace('/', ' ')}"
            shutil.copyfile(self.repository / wanted, blob)
            (target / wanted).unlink(missing_ok=True)
            (target / wanted).symlink_to(blob)
        return str(target)


def test_an_adapter_of_the_hub(base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [expected] = read_adapters([write_peft(tmp_path / "repository")], base)
    files("optimizer.pt", "tokenizer.json", "checkpoint-1/adapter_model.safetensors", "model.safetensors")(
        tmp_path / "repository"
    )
    hub = FakeHub(tmp_path / "repository", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    monkeypatch.chdir(tmp_path)
    [adapter] = read_adapters(["someone/adapter@v2=0.7"], base)
    assert same(adapter, expected)
    assert (adapter.weight, adapter.to_dict()["file"]) == (0.7, "someone/adapter@0123abc")
    assert hub.asked[0][0] == "v2"
    got = {path.relative_to(tmp_path / "cache/0123abc").as_posix() for path in (tmp_path / "cache").rglob("*/*")}
    assert got == {CONFIG, WEIGHTS, "tokenizer.json"}
    assert exporter.inspect("someone/adapter").what == "PEFT LoRA"
    assert hub.asked[-1][0] is None
    with pytest.raises(
        InputError, match=r"adapter other/adapter is neither a path here nor .* other/adapter is not there"
    ):
        read_adapters(["other/adapter"], base)
    write_peft(tmp_path / "someone" / "adapter", lora_alpha=5)  # what is here comes first
    asked = len(hub.asked)
    [local] = read_adapters(["someone/adapter"], base)
    assert (len(hub.asked), local.name) == (asked, "adapter")


def test_a_trainer_s_file_on_the_hub(base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repository").mkdir()
    write_adapter(tmp_path / "repository" / "lora.pth", random_adapter(square(linear_modules(base.directory))))
    files("rng_state.pth")(tmp_path / "repository")
    monkeypatch.setattr("huggingface_hub.snapshot_download", FakeHub(tmp_path / "repository", tmp_path / "cache"))
    [adapter] = read_adapters(["someone/adapter"], base)
    assert (adapter.form, adapter.name) == ("trainer", "someone/adapter@0123abc")


def test_a_revision_and_a_weight_are_taken_apart() -> None:
    assert split_weight("org/name@abc=0.7") == (Path("org/name@abc"), 0.7)
    assert split_weight("org/name@abc") == (Path("org/name@abc"), 1.0)
