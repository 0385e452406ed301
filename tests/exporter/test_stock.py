"""Checkpoints that load without code of their own: the very model that was merged, in one branch."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from pos2d import exporter, runtime
from pos2d.errors import InputError, ParityError, UsageError
from pos2d.manifest import read_manifest
from pos2d.spec import Rope2DSpec
from tests.bases import CONFIGS, SHAPE, linear_modules, random_adapter, weights, write_adapter, write_base
from tests.bounds import logits_bound
from tests.conftest import CASES, Golden, read_golden
from tests.exporter import plain_loading
from tests.runtime.test_transformers_loading import in_transformers

PAIRS = [6, 3, 5, 1]
FACTORS = [1.0, 1.3, 2.0, 3.1, 4.0, 4.0]
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 1.0, "attention_factor": 1.2}
BASES = CONFIGS | {
    "llama with longrope rope": LlamaConfig(
        **SHAPE, rope_parameters=LONGROPE | {"short_factor": FACTORS, "long_factor": FACTORS}
    )
}
IDS = np.random.default_rng(5).integers(3, 300, 40)[None]


@dataclass(frozen=True, slots=True)
class Pair:
    """The same weights as a checkpoint of kind stock and as a merged directory, and a prompt ``[1, S]``."""

    stock: Path
    merged: Path
    ids: np.ndarray


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """The goldens, and every family and rope type with branch frequencies among the fast and the slow ones."""
    made = {}
    for name, flags, ids in inputs(tmp_path_factory.mktemp("bases")):
        place = tmp_path_factory.mktemp("pair")
        exporter.merge(output=place / "merged", **flags)
        exporter.export(None, place / "stock", format="stock", **flags)
        made[name] = Pair(place / "stock", place / "merged", ids)
    return made


def inputs(place: Path) -> Iterator[tuple[str, dict[str, Any], np.ndarray]]:
    for case in CASES:
        golden = read_golden(case)
        yield case, golden.flags, golden.tensors["single.input_ids"]
    for name, config in BASES.items():
        base = write_base(place / name.replace(" ", "_"), config)
        lora = write_adapter(base.with_suffix(".pth"), random_adapter(linear_modules(base)))
        yield name, {"base_model": base, "lora": lora, "pair_indices": PAIRS}, IDS


def test_plain_transformers_computes_what_we_do(pairs: dict[str, Pair], tmp_path: Path) -> None:
    """The newest release and 4.57 load every one without code of its own, and agree in logits and greedy tokens."""
    given = {name: (str(pair.stock), pair.ids.tolist()) for name, pair in pairs.items()}
    of_5 = plain_loading.computed(given, tmp_path / "5")
    program = Path(plain_loading.__file__).read_text(encoding="utf-8")
    of_4 = in_transformers("4.57", program, tmp_path, json.dumps(given), tmp_path / "4")["tokens"]
    for name, pair in pairs.items():
        model = runtime.load(pair.merged, device="cpu", dtype="float32")
        expected = model.logits(pair.ids)
        for release, tokens in (("5", of_5[name]), ("4", of_4[name])):
            theirs = load_file(tmp_path / release)[name].numpy()
            assert np.abs(theirs - expected).max() <= min(1e-4, logits_bound(expected)), (release, name)
            answered = np.concatenate([pair.ids[0], tokens])[None]
            assert tokens == model.logits(answered)[0, -len(tokens) - 1 : -1].argmax(-1).tolist(), (release, name)


def test_it_has_the_weights_of_a_merge_and_no_code(pairs: dict[str, Pair]) -> None:
    for name, pair in pairs.items():
        stock, merged = weights(pair.stock), weights(pair.merged)
        assert set(stock) == set(merged)
        assert all(torch.equal(stock[tensor], merged[tensor]) for tensor in merged), name
        assert not list(pair.stock.rglob("*.py"))
        config = json.loads((pair.stock / "config.json").read_text(encoding="utf-8"))
        assert not {"auto_map", "rope_2d"} & set(config)
        assert config["architectures"] == [type(AutoModelForCausalLM.from_pretrained(pair.stock)).__name__]


def test_manifest_card_and_inspect_say_that_it_has_one_branch(
    pairs: dict[str, Pair], call: Callable[..., Result]
) -> None:
    for name, pair in pairs.items():
        manifest, trained = read_manifest(pair.stock), read_manifest(pair.merged).rope_2d
        assert manifest.kind == "stock"
        assert not manifest.rope_2d.is_2d
        assert manifest.rope_2d.visibility == "isolated"
        assert manifest.one_branch_of == (trained if trained.is_2d else None), name
        card = (pair.stock / "README.md").read_text(encoding="utf-8")
        assert ("One branch only" in card) == trained.is_2d
        assert "README.md" in manifest.files
        if not trained.is_2d:  # then the merge itself is such a checkpoint
            assert (pair.merged / "README.md").read_text(encoding="utf-8") == card
        shown = call("inspect", pair.stock).stdout
        assert ("one branch of a model whose frequencies" in shown) == trained.is_2d


def test_the_runtime_gives_the_same_logits_bit_for_bit(pairs: dict[str, Pair]) -> None:
    """Where the base scales no frequency; elsewhere the formula of longrope misses some of them by a rounding."""
    for name, pair in pairs.items():
        stock, merged = (runtime.load(path, device="cpu").logits(pair.ids) for path in (pair.stock, pair.merged))
        difference = np.abs(stock - merged).max()
        assert difference == 0 or ("rope" in name and difference <= logits_bound(merged)), name


def test_verify_and_eval_compare_it_with_the_merged_directory(pairs: dict[str, Pair]) -> None:
    pair = pairs["llama with yarn rope"]
    report = runtime.verify(pair.stock, pair.merged)
    assert report.passed
    assert report.max_rel_diff is not None
    assert report.max_rel_diff <= 2.0**-15
    with pytest.raises(InputError, match=r"has only one branch of .*merged; compare it with"):
        runtime.verify(pair.merged, pair.stock)
    other = pairs["llama with llama3 rope"]
    with pytest.raises(InputError, match="not the same model"):
        runtime.verify(pair.stock, other.merged)


def test_from_a_merged_directory_it_is_the_same(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs["llama_r025_right"]
    exporter.export(pair.merged, tmp_path / "out", format="stock", no_verify=True)
    for path in pair.stock.iterdir():
        same = path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
        assert same or path.name == "manifest.json", path.name


def test_a_change_of_the_frequencies_does_not_pass_the_check(
    pairs: dict[str, Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a merged directory the export compares with it what it has written, unless that is rounded further."""
    stock = import_module("pos2d.exporter.formats.stock")
    merged = pairs["llama"].merged
    asked: list[Path | None] = []

    right = stock.stock_config

    def wrong(*arguments: Any) -> dict[str, Any]:
        return {**right(*arguments), "rope_scaling": None}

    def verify(staging: Path, against: Path | None) -> None:
        asked.append(against)
        runtime.verify(staging, against).raise_if_failed()

    monkeypatch.setattr(stock, "stock_config", wrong)
    monkeypatch.setattr(stock, "closing_check", verify)
    with pytest.raises(ParityError, match="do not use this artifact"):
        exporter.export(merged, tmp_path / "out", format="stock")
    assert asked == [merged]
    assert not (tmp_path / "out").exists()
    exporter.export(merged, tmp_path / "out", format="stock", dtype="bfloat16")
    assert asked == [merged]


@pytest.mark.parametrize("quant", ["8bit", "nf4"])
def test_quantised_it_has_the_tensors_of_a_bitsandbytes_checkpoint(qwen2: Golden, quant: Any, tmp_path: Path) -> None:
    skipped = "lm_head" if quant == "8bit" else "lm_head,gate_proj,up_proj,down_proj"
    options: Any = {"quant": quant, "skip_modules": skipped, "dtype": "float32", **qwen2.flags}
    for kind in ("bnb", "stock"):
        exporter.export(None, tmp_path / kind, format=kind, **options)
    bnb, stock = weights(tmp_path / "bnb"), weights(tmp_path / "stock")
    assert set(stock) == set(bnb)
    assert all(torch.equal(stock[name], bnb[name]) for name in bnb)
    ids = qwen2.tensors["single.input_ids"]
    expected = runtime.load(tmp_path / "bnb", device="cpu", dtype="float32").logits(ids)
    found = runtime.load(tmp_path / "stock", device="cpu", dtype="float32").logits(ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=logits_bound(expected))
    kernel = {"attn_implementation": "eager", "dtype": torch.float32}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", **kernel).train(quant == "nf4")
    flags: Any = {"int8_kernel": "bnb"} if quant == "8bit" else {}
    ours = runtime.load(tmp_path / "bnb", device="cpu", dtype="float32", attn_implementation="eager", **flags)
    with torch.no_grad():
        theirs = plain(torch.tensor(ids)).logits.numpy()
    expected = ours.logits(ids)
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=logits_bound(expected))


def test_an_adapter_that_rounding_swallows_is_named(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", CONFIGS["llama"])
    save_file({name: tensor.bfloat16() for name, tensor in weights(base).items()}, base / "model.safetensors")
    lora = write_adapter(tmp_path / "lora.pth", random_adapter(linear_modules(base), seed=3))
    flags: Any = {"base_model": base, "lora": f"{lora}=0.005", "rope_2d_ratio": 0.5, "format": "stock"}
    narrow = exporter.export(None, tmp_path / "narrow", **flags)
    assert [warning for warning in narrow.warnings if "bfloat16 retains" in warning]
    assert not exporter.export(None, tmp_path / "wide", dtype="float32", **flags).warnings


def test_what_a_further_rounding_retains_is_not_claimed(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", CONFIGS["llama"])
    lora = write_adapter(tmp_path / "lora.pth", random_adapter(linear_modules(base), seed=3))
    exporter.merge(base, f"{lora}=0.005", tmp_path / "merged", no_patch_rope=True)
    flags: Any = {"format": "stock", "no_verify": True}
    kept = exporter.export(tmp_path / "merged", tmp_path / "kept", **flags)
    rounded = exporter.export(tmp_path / "merged", tmp_path / "rounded", dtype="bfloat16", **flags)
    again = exporter.export(tmp_path / "rounded", tmp_path / "again", **flags)
    of_plain = exporter.export(base, tmp_path / "plain", dtype="bfloat16", **flags)
    assert [len(report.warnings) for report in (kept, rounded, again, of_plain)] == [0, 1, 0, 0]
    assert "rounded further, to bfloat16" in rounded.warnings[0]
    ledgers = [read_manifest(tmp_path / name).ledger or {} for name in ("kept", "rounded", "again")]
    found = [ledger["totals"].get("retention") for ledger in ledgers]
    assert found == [pytest.approx(1, abs=1e-3), None, None]


def test_one_branch_is_carried_on(pairs: dict[str, Pair], tmp_path: Path) -> None:
    """What is made of such a checkpoint has one branch as well, and says so."""
    pair = pairs["llama"]
    exporter.export(pair.stock, tmp_path / "onnx", no_verify=True)
    manifest = read_manifest(tmp_path / "onnx")
    assert manifest.one_branch_of == Rope2DSpec(6, tuple(PAIRS))
    expected = runtime.load(pair.merged, device="cpu").logits(pair.ids)
    found = runtime.load(tmp_path / "onnx").logits(pair.ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=logits_bound(expected))


def test_as_a_base_it_stays_one_branch(pairs: dict[str, Pair], tmp_path: Path) -> None:
    base = pairs["llama"].stock
    lora = write_adapter(tmp_path / "lora.pth", random_adapter(linear_modules(base), seed=4))
    for flags in ({"rope_2d_ratio": 0.5}, {"pair_indices": [2]}):
        with pytest.raises(
            InputError, match=r"frequencies 5, 6 do not turn, so this base is one branch.*`no_patch_rope`"
        ):
            exporter.merge(base, lora, tmp_path / "out", **flags)
    exporter.merge(base, lora, tmp_path / "out", no_patch_rope=True)
    assert read_manifest(tmp_path / "out").one_branch_of == Rope2DSpec(6, tuple(PAIRS))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "One branch only" in card
    assert "The adapter was trained with 2D RoPE" not in card, "it was trained on top"


@pytest.mark.parametrize("name", ["llama with yarn rope", "llama with longrope rope"])
def test_vllm_finds_the_scale_in_all_that_is_made_of_it(name: str, pairs: dict[str, Pair], tmp_path: Path) -> None:
    """It does not read the key of transformers, so that without its own it would compute something else."""
    base = pairs[name].stock
    lora = write_adapter(tmp_path / "lora.pth", random_adapter(linear_modules(base), seed=4))
    exporter.merge(base, lora, tmp_path / "merged", no_patch_rope=True)
    exporter.export(base, tmp_path / "bnb", format="bnb", quant="8bit")
    first, *others = (
        json.loads((path / "config.json").read_text(encoding="utf-8"))["rope_scaling"]
        for path in (base, tmp_path / "merged", tmp_path / "bnb")
    )
    assert first["short_mscale"] == first["long_mscale"] == first["attention_factor"] != 1
    assert others == [first, first]


def test_the_card_belongs_to_its_owner(pairs: dict[str, Pair], tmp_path: Path) -> None:
    """Whoever publishes a model edits its card; nothing is computed from it."""
    out = tmp_path / "out"
    shutil.copytree(pairs["llama"].stock, out)
    with (out / "README.md").open("a", encoding="utf-8") as card:
        card.write("license: apache-2.0\n")
    files = runtime.verify(out).files
    (out / "README.md").unlink()
    assert runtime.verify(out).files == files == len(read_manifest(out).files) - 1
    (out / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json is missing"):
        runtime.verify(out)


def test_options_that_it_does_not_have(pairs: dict[str, Pair], tmp_path: Path, call: Callable[..., Result]) -> None:
    with pytest.raises(UsageError, match="takes `quant` none, 8bit, nf4; `quant='int8'` needs `format='onnx'`"):
        exporter.export(pairs["llama"].merged, tmp_path / "out", format="stock", quant="int8")
    with pytest.raises(UsageError, match="`skip_modules` names layers that are not quantised"):
        exporter.export(pairs["llama"].merged, tmp_path / "out", format="stock", skip_modules="lm_head")
    done = call("export", pairs["llama"].merged, "--format", "stock", "--block-size", "32", "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "--block-size belongs to --format onnx" in done.stderr
