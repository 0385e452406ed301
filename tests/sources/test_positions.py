"""Which positions a source gets where the call does not give them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pos2d import exporter, runtime
from pos2d.errors import UsageError
from pos2d.manifest import read_manifest
from pos2d.sources.positions import TrainedPositions, choose_positions
from tests.bases import CONFIGS, write_base, write_tokenizer
from tests.sources.test_peft import ALL, UNTIED, pytestmark, train

__all__ = ["pytestmark"]


@pytest.mark.parametrize(
    ("forms", "ratio", "warned", "noted"),
    [
        ({}, None, False, False),
        ({"a": "peft"}, None, False, True),
        ({"a": "mlx"}, None, False, True),
        ({"a": "trainer"}, 0.5, True, False),
        ({"a": "state dict"}, 0.5, True, False),
        ({"a": "peft", "b": "trainer"}, 0.5, True, False),
    ],
)
def test_the_default_follows_the_form(forms: dict[str, str], ratio: float | None, warned: bool, noted: bool) -> None:
    chosen = choose_positions(TrainedPositions(), forms)
    assert chosen.positions.rope_2d_ratio == ratio
    assert chosen.positions.no_patch_rope is (ratio is None)
    assert (bool(chosen.warnings), bool(chosen.notes)) == (warned, noted)
    assert all("`no_patch_rope`" in warning for warning in chosen.warnings)
    assert all("`rope_2d_ratio`" in note for note in chosen.notes)


@pytest.mark.parametrize(
    "given", [{"rope_2d_ratio": 0.25}, {"pair_indices": "3,4"}, {"no_patch_rope": True}, {"rope_2d_ratio": 0.0}]
)
@pytest.mark.parametrize("form", ["peft", "trainer"])
def test_what_is_given_is_taken_in_silence(given: dict[str, Any], form: str) -> None:
    positions = TrainedPositions(**given)
    chosen = choose_positions(positions, {"a": form})
    assert (chosen.positions, chosen.warnings, chosen.notes) == (positions, (), ())


@pytest.mark.parametrize("given", [{"branch_stride": 256}, {"align_to": "right"}])
def test_a_stride_without_2d_rope_is_a_mistake(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="belong to 2D RoPE"):
        choose_positions(TrainedPositions(**given), {"a": "peft"})
    assert choose_positions(TrainedPositions(**given), {"a": "trainer"}).positions.rope_2d_ratio == 0.5


def test_an_adapter_of_peft_becomes_a_plain_checkpoint(tmp_path: Path, call: Callable[..., Result]) -> None:
    base, adapter = write_base(tmp_path / "base", CONFIGS[UNTIED]), tmp_path / "adapter"
    write_tokenizer(base, chat=True)
    train(base, target_modules=ALL, use_rslora=True).save_pretrained(adapter)
    merged = call("merge", "--base-model", base, "--lora", adapter, "-o", tmp_path / "out")
    assert merged.exit_code == 0, merged.output
    assert "warning" not in merged.stderr
    assert f"note: {adapter.name}: read as an ordinary LoRA" in merged.stderr
    assert "positions: no 2D RoPE" in merged.stdout
    assert read_manifest(tmp_path / "out").kind == "stock"
    assert not list((tmp_path / "out").glob("*.py"))
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert not {"auto_map", "rope_2d"} & set(config)

    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits
    assert (plain - trained).abs().max() <= 1e-4 * trained.abs().max()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids == [97 - 33, 98 - 33]

    model = runtime.load(tmp_path / "out", device="cpu")
    prompts = ["one", "two and three", "4"]
    together = [answer.text for answer in model.generate(prompts, max_new_tokens=6)]
    assert together == [model.generate(prompt, max_new_tokens=6)[0].text for prompt in prompts]

    exported = exporter.export(tmp_path / "out", tmp_path / "onnx")
    assert exported.parity is not None
    assert "positions  read as ordinary" in call("inspect", adapter).stdout
