"""Bad input: each kind ends with its own sentence and exit code, without a traceback, and leaves nothing behind."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from tests.conftest import Golden

Call = Callable[..., Result]
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "factor": 1.0}


class Payload:
    """Runs code where a pickle of it is loaded."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


@pytest.fixture
def merge(call: Call, qwen2: Golden, tmp_path: Path) -> Callable[..., Result]:
    """``merge`` of the golden case with some inputs replaced; holds that a failure leaves no output."""

    def run(*flags: object, base: Path | None = None, lora: Path | None = None) -> Result:
        inputs = ["--base-model", base or qwen2.path / "base", "--lora", lora or qwen2.path / "lora.pth"]
        before = set(tmp_path.iterdir())
        result = call("merge", *inputs, "-o", tmp_path / "out", *flags)
        assert set(tmp_path.iterdir()) == before
        return result

    return run


def expect(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def adapter_of(golden: Golden) -> dict[str, torch.Tensor]:
    adapter: dict[str, torch.Tensor] = torch.load(golden.path / "lora.pth", weights_only=True)
    return adapter


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_wrong_rank(merge: Callable[..., Result]) -> None:
    expect(merge("--lora-rank", 8), 3, "lora.pth", "rank 4, not 8")


def test_adapter_of_another_base(merge: Callable[..., Result], qwen2: Golden) -> None:
    other = qwen2.path.parent / "llama_r025_right"
    expect(merge(lora=other / "lora.pth"), 3, "lora.pth does not fit", "wrong shapes", "k_proj", "trained on")


def test_adapter_of_a_deeper_base(merge: Callable[..., Result], qwen2: Golden, tmp_path: Path) -> None:
    deeper = {name.replace("layers.1", "layers.7"): tensor for name, tensor in adapter_of(qwen2).items()}
    lora = saved(tmp_path / "lora.pth", deeper)
    expect(merge(lora=lora), 3, "missing modules model.layers.1", "left-over modules model.layers.7")


def test_missing_tensor(merge: Callable[..., Result], qwen2: Golden, tmp_path: Path) -> None:
    adapter = adapter_of(qwen2)
    name = sorted(adapter)[1]
    del adapter[name]
    expect(merge(lora=saved(tmp_path / "lora.pth", adapter)), 3, "lacks the tensor", name)


def test_missing_module(merge: Callable[..., Result], qwen2: Golden, tmp_path: Path) -> None:
    adapter = {name: t for name, t in adapter_of(qwen2).items() if "layers.0.self_attn.q_proj" not in name}
    lora = saved(tmp_path / "lora.pth", adapter)
    expect(merge(lora=lora), 3, "missing modules model.layers.0.self_attn.q_proj")


def test_a_kind_of_module_that_is_missing_in_all_layers(
    merge: Callable[..., Result], qwen2: Golden, tmp_path: Path
) -> None:
    adapter = {name: tensor for name, tensor in adapter_of(qwen2).items() if "o_proj" not in name}
    expect(merge(lora=saved(tmp_path / "lora.pth", adapter)), 3, "missing modules model.layers.0.self_attn.o_proj")


def test_a_module_covered_in_some_layers_only(merge: Callable[..., Result], qwen2: Golden, tmp_path: Path) -> None:
    extra = {
        "model.layers.0.mlp.up_proj.lora.A.weight": torch.ones(4, 64),
        "model.layers.0.mlp.up_proj.lora.B.weight": torch.ones(112, 4),
    }
    lora = saved(tmp_path / "lora.pth", adapter_of(qwen2) | extra)
    expect(merge(lora=lora), 3, "missing modules model.layers.1.mlp.up_proj")


def test_extra_tensor(merge: Callable[..., Result], qwen2: Golden, tmp_path: Path) -> None:
    lora = saved(tmp_path / "lora.pth", adapter_of(qwen2) | {"model.norm.weight": torch.ones(64)})
    expect(merge(lora=lora), 3, "not LoRA factors", "model.norm.weight")


def test_same_tensor_under_two_prefixes(merge: Callable[..., Result], qwen2: Golden, tmp_path: Path) -> None:
    adapter = adapter_of(qwen2)
    name = next(iter(adapter))
    lora = saved(tmp_path / "lora.pth", adapter | {f"module.{name}": adapter[name]})
    expect(merge(lora=lora), 3, "twice")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(2)], "does not hold a dictionary of tensors"),
        ({"a": 1}, "does not hold a dictionary of tensors"),
        ({"weight": torch.ones(2, 2)}, "not a LoRA file: no tensor is named"),
        ({}, "not a LoRA file: no tensor is named"),
    ],
)
def test_not_a_lora_file(merge: Callable[..., Result], tmp_path: Path, content: object, words: str) -> None:
    expect(merge(lora=saved(tmp_path / "lora.pth", content)), 3, "lora.pth", words)


@pytest.mark.parametrize("content", [b"", b"hello, world", b"\x80\x02", bytes(range(256)), b'{"a": 1}'])
def test_not_a_pickle(merge: Callable[..., Result], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lora.pth").write_bytes(content)
    expect(merge(lora=tmp_path / "lora.pth"), 3, "lora.pth")


def test_a_cut_file(merge: Callable[..., Result], qwen2: Golden, tmp_path: Path) -> None:
    whole = (qwen2.path / "lora.pth").read_bytes()
    for kept in (10, len(whole) // 2, len(whole) - 30):
        (tmp_path / "lora.pth").write_bytes(whole[:kept])
        expect(merge(lora=tmp_path / "lora.pth"), 3, "lora.pth")


def test_values_that_are_not_finite(merge: Callable[..., Result], qwen2: Golden, tmp_path: Path) -> None:
    adapter = adapter_of(qwen2)
    name = sorted(adapter)[2]
    adapter[name][0, 0] = float("nan")
    expect(merge(lora=saved(tmp_path / "lora.pth", adapter)), 3, name, "NaN")


def test_tensors_of_another_type(merge: Callable[..., Result], qwen2: Golden, tmp_path: Path) -> None:
    adapter = {name: tensor.long() for name, tensor in adapter_of(qwen2).items()}
    expect(merge(lora=saved(tmp_path / "lora.pth", adapter)), 3, "int64", "floating-point")


def test_mixed_ranks(merge: Callable[..., Result], qwen2: Golden, tmp_path: Path) -> None:
    adapter = adapter_of(qwen2)
    name = "model.layers.0.self_attn.q_proj.lora"
    adapter[f"{name}.A.weight"], adapter[f"{name}.B.weight"] = torch.ones(2, 64), torch.ones(64, 2)
    expect(merge(lora=saved(tmp_path / "lora.pth", adapter)), 3, "mixes the ranks 2, 4")


@pytest.mark.parametrize("form", ["torch", "legacy torch", "pickle 2", "pickle 4"])
def test_a_pickle_that_wants_to_run_code(
    merge: Callable[..., Result], qwen2: Golden, tmp_path: Path, form: str
) -> None:
    sentinel, lora = tmp_path / "sentinel", tmp_path / "lora.pth"
    content = {**adapter_of(qwen2), "payload": Payload(sentinel)} if "torch" in form else Payload(sentinel)
    if "torch" in form:
        torch.save(content, lora, _use_new_zipfile_serialization=form == "torch")
    else:
        lora.write_bytes(pickle.dumps(content, protocol=int(form[-1])))
    expect(merge(lora=lora), 4, "lora.pth", "do not load it")
    assert not sentinel.exists()


def edited_base(golden: Golden, target: Path, **changes: object) -> Path:
    shutil.copytree(golden.path / "base", target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in (config | changes).items() if value is not ...}
    (target / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    return target


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba3", "rope_theta": 10000.0}, "unknown architecture 'mamba3'; supported are llama"),
        ({"model_type": "gpt2", "rope_theta": ..., "rope_scaling": ...}, "gpt2 has no rotary position embedding"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' changes with the length"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.short_factor is missing"),
        ({"rope_scaling": LONGROPE | {"long_factor": [2.0] * 8}}, "differ, so that rope type 'longrope' changes"),
        ({"rope_scaling": LONGROPE | {"short_factor": [1.0]}}, "it must be a list of 8 numbers above 0"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope type 'dynamic' changes with the length"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": "pos2d_qwen2"}, "was made by this tool"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantised"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": ...}, "wrong shapes"),  # 4096, transformers' default
        ({"model_type": ...}, "has no model_type"),
        ({"num_hidden_layers": 3, "layer_types": ...}, "missing tensors model.layers.2"),
        ({"num_hidden_layers": 1, "layer_types": ...}, "unknown tensors model.layers.1"),
        ({"intermediate_size": 100}, "wrong shapes"),
    ],
)
def test_bases_that_cannot_be_merged(
    merge: Callable[..., Result], qwen2: Golden, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    expect(merge(base=edited_base(qwen2, tmp_path / "base", **changes)), 3, "base", words)


def test_merging_twice(merge: Callable[..., Result], qwen2: Golden, artifact_of: Callable[[Golden, str], Path]) -> None:
    expect(merge(base=artifact_of(qwen2, "merged")), 3, "merged already", "original base")


def test_bases_that_are_not_there(
    merge: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expect(merge(base=tmp_path / "nowhere"), 3, "nowhere does not exist")
    expect(merge(base=Path("someone/some-model-that-is-not-cached")), 3, "some-model-that-is-not-cached")
    expect(merge(lora=tmp_path / "nowhere.pth"), 3, "nowhere.pth does not exist")
    expect(merge(lora=tmp_path), 3, "has 0 .pth files")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}', encoding="utf-8")
    expect(merge(lora=tmp_path), 3, "peft_type 'IA3' is not supported")


def test_base_weights_that_are_damaged(merge: Callable[..., Result], qwen2: Golden, tmp_path: Path) -> None:
    base = edited_base(qwen2, tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    expect(merge(base=base), 3, "model.safetensors cannot be read")
    weights.unlink()
    expect(merge(base=base), 3, "has no model.safetensors", "pytorch_model.bin")
    (base / "config.json").write_text("{", encoding="utf-8")
    expect(merge(base=base), 3, "config.json cannot be read")
    (base / "config.json").unlink()
    expect(merge(base=base), 3, "config.json does not exist")


def test_base_weights_with_nan(merge: Callable[..., Result], qwen2: Golden, tmp_path: Path) -> None:
    base = edited_base(qwen2, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, base / "model.safetensors")
    expect(merge(base=base), 3, "model.norm.weight", "infinite")


def test_an_index_that_leaves_its_directory(merge: Callable[..., Result], qwen2: Golden, tmp_path: Path) -> None:
    base = edited_base(qwen2, tmp_path / "base")
    (base / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    expect(merge(base=base), 4, "../outside.safetensors", "do not trust")


def test_outputs_that_exist(call: Call, qwen2: Golden, tmp_path: Path) -> None:
    flags = ("--base-model", qwen2.path / "base", "--lora", qwen2.path / "lora.pth", "-o")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    expect(call("merge", *flags, tmp_path / "out"), 6, "out exists already and holds mine, which is not part of")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    assert call("merge", *flags, tmp_path / "empty").exit_code == 0
    expect(call("merge", *flags, tmp_path / "empty"), 6, "exists already", "replace it with --force")


def test_outputs_that_cannot_be_written(call: Call, qwen2: Golden, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    flags = ("--base-model", qwen2.path / "base", "--lora", qwen2.path / "lora.pth", "-o")
    expect(call("merge", *flags, tmp_path / "file" / "out"), 5, "cannot be created")


def test_an_internal_error_is_called_one(merge: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(sys.modules["pos2d.exporter.merge"], "write_weights", fail)
    expect(merge(), 1, "internal error", "ZeroDivisionError")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--pair-indices", "5,99"), "99"),
        (("--pair-indices", "5,5"), "twice"),
        (("--pair-indices", "five"), "whole numbers"),
    ],
)
def test_positions_that_the_base_does_not_have(
    merge: Callable[..., Result], flags: tuple[str, ...], words: str
) -> None:
    expect(merge(*flags), 3, words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--rope-2d-ratio", "2"), "--rope-2d-ratio 2.0 must be 0 to 1"),
        (("--branch-stride", "0"), "--branch-stride 0 must be 1 to 16777216"),
        (("--branch-stride", "99999999"), "--branch-stride 99999999 must be 1 to 16777216"),
    ],
)
def test_positions_that_no_base_has(merge: Callable[..., Result], flags: tuple[str, ...], words: str) -> None:
    expect(merge(*flags), 2, words)


def test_usage(call: Call, merge: Callable[..., Result], tmp_path: Path) -> None:
    expect(merge("--no-patch-rope", "--rope-2d-ratio", "0.5"), 2, "exclude one another")
    for flags in (("--align-to", "middle"), ("--dtype", "int8"), ("--surprise",)):
        assert merge(*flags).exit_code == 2
    assert call("export", tmp_path, "-o", tmp_path / "out", "--format", "pickle").exit_code == 2
    assert call("nothing").exit_code == 2


@pytest.mark.parametrize(
    "command", [("export", "-o", "OUT"), ("verify", "--against", "IN"), ("run", "--prompt", "hello")]
)
def test_things_that_are_not_artifacts(call: Call, qwen2: Golden, tmp_path: Path, command: tuple[str, ...]) -> None:
    verb, *flags = command
    flags = [str(tmp_path / flag) if flag in ("OUT", "IN") else flag for flag in flags]
    expect(call(verb, tmp_path / "nowhere", *flags), 3, "nowhere does not exist")
    expect(call(verb, qwen2.path, *flags), 3, "config.json does not exist", "a model is in", "base")
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_that_lost_a_file(
    call: Call, qwen2: Golden, artifact_of: Callable[[Golden, str], Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(artifact_of(qwen2, "onnx"), tmp_path / "copy")
    data = copy / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    expect(call("run", copy, "--prompt", "hello"), 3, "model.onnx.data has", "the manifest says")
    data.unlink()
    expect(call("run", copy, "--prompt", "hello"), 3, "model.onnx.data is missing; copy the artifact again")
    (copy / "manifest.json").write_text("[]", encoding="utf-8")
    expect(call("run", copy, "--prompt", "hello"), 3, "manifest.json: the manifest is not a JSON object")
    (copy / "manifest.json").write_text('{"format_version": 99}', encoding="utf-8")
    expect(call("run", copy, "--prompt", "hello"), 3, "format version 99")


def test_exporting_an_export(
    call: Call, qwen2: Golden, artifact_of: Callable[[Golden, str], Path], tmp_path: Path
) -> None:
    expect(call("export", artifact_of(qwen2, "onnx"), "-o", tmp_path / "out"), 3, "kind onnx")


# Ends itself by a signal while a temporary directory exists, as a run with an adapter's tokenizer has one.
ENDING = """
import os, signal, sys
from pos2d.commands import main
from pos2d.runtime.opening.opened_model import TemporaryFolder

def cli():
    folder = TemporaryFolder()
    print(folder.path)
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
main.cli = cli
main.main()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs signals of Unix")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_leaves_no_temporary_directory(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", ENDING, name], capture_output=True, text=True, check=False)
    assert Path(done.stdout.strip()).name.startswith("pos2d-"), done.stderr
    assert not Path(done.stdout.strip()).exists()
