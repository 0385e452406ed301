"""PEFT directories through the whole merge: the written files against PEFT's own merge, and its unmerged logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pos2d import exporter
from pos2d.manifest import read_manifest
from tests.bases import CONFIGS, write_base
from tests.bounds import gamma
from tests.sources.test_peft import EXACT, HEAD, TIED, UNTIED, merged_by_peft, pytestmark, train

__all__ = ["pytestmark"]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora and patterns": {"use_rslora": True, "target_modules": "all-linear", "rank_pattern": {"v_proj": 2}},
    "dora": {"use_dora": True, "target_modules": ["o_proj", "down_proj"]},
    "biases": {"bias": "lora_only", "target_modules": ["q_proj", "k_proj"]},
    "lora bias and saved modules": {"lora_bias": True, "modules_to_save": ["lm_head", "norm"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_written_weights_are_those_of_peft_rounded_once(variant: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", CONFIGS[UNTIED])
    model = train(base, **VARIANTS[variant])
    model.save_pretrained(str(tmp_path / "adapter"))
    report = exporter.merge(base, tmp_path / "adapter", tmp_path / "out", max_shard_size="40KB")
    ours = {k: t for file in (tmp_path / "out").glob("*.safetensors") for k, t in load_file(file).items()}
    theirs, before = merged_by_peft(model), load_file(base / "model.safetensors")
    assert set(ours) == set(theirs)
    moved = {name for name, tensor in ours.items() if not torch.equal(tensor, before[name])}
    assert report.totals is not None
    assert report.ledger is not None
    assert moved == {name for name, entry in report.ledger.items() if entry.action != "copied"}
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.double(), theirs[name], rtol=gamma(1, torch.float32), atol=EXACT, msg=name)


def test_a_lora_of_a_tied_embedding_keeps_the_head_that_it_was_trained_with(tmp_path: Path) -> None:
    """PEFT's merge would change the head as well; what was trained is the unmerged model."""
    base = write_base(tmp_path / "base", CONFIGS[TIED])
    trained = train(base, target_modules=["embed_tokens", "q_proj"])
    trained.save_pretrained(str(tmp_path / "adapter"))
    exporter.merge(base, tmp_path / "adapter", tmp_path / "out", no_patch_rope=True)
    assert HEAD in load_file(tmp_path / "out" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ids = torch.arange(20)[None] * 7 % 300
    with torch.no_grad():
        expected, found = trained.eval()(ids).logits, loaded.eval()(ids).logits
        base_logits = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # of logits up to 8: ten times what float32 gives
    assert (expected - base_logits).abs().max() > 0.1


def test_peft_and_trainer_together(tmp_path: Path, call: Callable[..., Result]) -> None:
    """Both forms in one merge, each with its weight, and a configuration whose hash is noted."""
    base = write_base(tmp_path / "base", CONFIGS[UNTIED])
    train(base, seed=1).save_pretrained(str(tmp_path / "one"))
    train(base, seed=2, target_modules=["v_proj"]).save_pretrained(str(tmp_path / "two"))
    flags = ("--lora", f"{tmp_path / 'one'}=0.5", "--lora", tmp_path / "two")
    done = call("merge", "--base-model", base, *flags, "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    adapters = read_manifest(tmp_path / "out").adapters
    assert [(a["file"], a["form"], a["weight"], a["tensors"]) for a in adapters] == [
        ("one", "peft", 0.5, 2),
        ("two", "peft", 1.0, 2),
    ]
    assert len({a["config_sha256"] for a in adapters}) == 2
    sources = {tuple(entry["sources"]) for entry in json.loads(done.stdout)["ledger"].values()}
    assert sources == {("model.safetensors",), ("model.safetensors", "one"), ("model.safetensors", "two")}


def test_an_edited_configuration_is_another_adapter(tmp_path: Path, call: Callable[..., Result]) -> None:
    """A resumed merge must not go on with another alpha over the same weights."""
    base = write_base(tmp_path / "base", CONFIGS[UNTIED])
    train(base).save_pretrained(str(tmp_path / "adapter"))
    flags = ("merge", "--base-model", base, "--lora", tmp_path / "adapter", "-o", tmp_path / "out", "--resume")
    assert call(*flags).exit_code == 0
    assert call(*flags).exit_code == 0
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(
        config.read_text(encoding="utf-8").replace('"lora_alpha": 6', '"lora_alpha": 7'), encoding="utf-8"
    )
    assert call(*flags).exit_code == 6
