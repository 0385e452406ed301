"""Adapters that were trained one after the other, held against PEFT; and sums of adapters that nobody trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pos2d import exporter
from pos2d.errors import InputError, UsageError
from pos2d.manifest import read_manifest
from pos2d.sources.adapters import read_adapters
from pos2d.sources.adapters.adapter import Adapter
from pos2d.sources.checkpoints.base import read_base
from pos2d.sources.checkpoints.checkpoint import Checkpoint
from tests.bases import CONFIGS, weights, write_base
from tests.sources.test_peft import EXACT, HEAD, UNTIED, assert_same, merged, train, weights_of

Q = "model.layers.0.self_attn.q_proj.weight"
WHOLE: dict[str, Any] = {"modules_to_save": ["lm_head"]}
DORA: dict[str, Any] = {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "two that save the head": (WHOLE, WHOLE),
    "a head, then factors for it": (WHOLE, {"target_modules": ["lm_head", "q_proj"]}),
    "factors, then a whole module": ({"target_modules": ["lm_head"]}, WHOLE),
    "dora on a sum": ({}, DORA),
    "dora on dora": (DORA, DORA),
    "rows after rows": ({"trainable_token_indices": [3, 9]}, {"trainable_token_indices": [9, 11]}),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("chains") / "base", CONFIGS[UNTIED])


def chained(base: Path, folder: Path, *steps: dict[str, Any]) -> PeftModel:
    """Adapters ``0``, ``1``, … in ``folder``, each trained on PEFT's merge of those before it; the last model."""
    current = base
    for number, settings in enumerate(steps):
        model = train(current, seed=number + 1, **settings)
        model.save_pretrained(folder / str(number), save_embedding_layers=False)
        if number + 1 < len(steps):
            # In float64, so that the next adapter starts from the exact result.
            current = folder / f"merged {number}"
            model.double().merge_and_unload().save_pretrained(current)
    return model


def by_peft(base: Path, *adapters: Path) -> dict[str, torch.Tensor]:
    """PEFT's own chain in float64: merge the first, load the next on the result and merge that."""
    model: Any = AutoModelForCausalLM.from_pretrained(base).double()
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).double().merge_and_unload()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def read(base: Path, *lora: Path | str, then: tuple[Path | str, ...] = ()) -> tuple[Checkpoint, list[Adapter]]:
    checkpoint = read_base(str(base))
    return checkpoint, read_adapters(lora, checkpoint, then=then)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_chain_is_that_of_peft(base: Path, tmp_path: Path, pair: str) -> None:
    chained(base, tmp_path, *PAIRS[pair])
    first, second = tmp_path / "0", tmp_path / "1"
    _, adapters = read(base, first, then=(second,))
    ours, theirs = merged(base, adapters), by_peft(base, first, second)
    assert_same(ours, theirs, base, {name for adapter in adapters for name in adapter.deltas})
    with pytest.raises(InputError, match="`then`") as caught:
        read(base, first, second)
    assert "0 " in str(caught.value)
    assert "1 " in str(caught.value)


def test_factors_give_the_same_in_a_sum_and_in_a_chain(base: Path, tmp_path: Path) -> None:
    chained(base, tmp_path, {}, {"target_modules": ["q_proj", "v_proj"]})
    both = [str(tmp_path / "0"), f"{tmp_path / '1'}=0.5"]
    at_once, in_turn = read(base, *both)[1], read(base, both[0], then=(both[1],))[1]
    expected = merged(base, at_once)
    assert all((tensor - expected[name]).abs().max() <= EXACT for name, tensor in merged(base, in_turn).items())


def test_rows_of_different_tokens_are_a_sum(base: Path, tmp_path: Path) -> None:
    chained(base, tmp_path, {"trainable_token_indices": [3, 9]}, {"trainable_token_indices": [8, 11]})
    expected = by_peft(base, tmp_path / "0", tmp_path / "1")
    found = merged(base, read(base, tmp_path / "0", tmp_path / "1")[1])
    assert all((tensor - expected[name]).abs().max() <= EXACT for name, tensor in found.items())


def test_base_values_that_were_saved_along_do_not_stand_in_the_way_of_a_sum(base: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        train(base, seed=number, target_modules=["lm_head"]).save_pretrained(tmp_path / str(number))
        assert "base_model.model.lm_head.base_layer.weight" in load_file(
            tmp_path / str(number) / "adapter_model.safetensors"
        )
    adapters = read(base, tmp_path / "1", tmp_path / "2")[1]
    before, apart = weights_of(base)[HEAD], [merged(base, [adapter])[HEAD] for adapter in adapters]
    assert (merged(base, adapters)[HEAD] - (apart[0] + apart[1] - before)).abs().max() <= EXACT


def test_a_written_chain_is_rounded_once_and_recorded(base: Path, tmp_path: Path) -> None:
    chained(base, tmp_path, WHOLE, DORA | WHOLE)
    inputs: dict[str, Any] = {"lora": tmp_path / "0", "then": [tmp_path / "1"], "no_patch_rope": True}
    report = exporter.merge(base, output=tmp_path / "out", **inputs)
    expected = by_peft(base, tmp_path / "0", tmp_path / "1")
    found = weights(tmp_path / "out")
    assert all(
        (found[name] - exact.float()).abs().max() <= 2.0**-23 * exact.abs().max() for name, exact in expected.items()
    )
    assert [adapter.get("step", 0) for adapter in read_manifest(tmp_path / "out").adapters] == [0, 1]
    assert report.ledger is not None
    assert report.ledger[HEAD].sources[1:] == ("0", "1")
    assert report.ledger[HEAD].retention == pytest.approx(1, abs=1e-6)
    assert report.ledger[HEAD].rms_delta == pytest.approx(
        float((expected[HEAD] - weights_of(base)[HEAD]).square().mean().sqrt()), rel=1e-6
    )
    with pytest.raises(UsageError, match="give every adapter once"):
        exporter.merge(base, tmp_path / "0", tmp_path / "no", then=tmp_path / "0", no_patch_rope=True)


def test_dora_over_rows_of_zeros(tmp_path: Path) -> None:
    """PEFT divides 0 by 0 there. A magnitude of 0 leaves the rows at 0, and no other has a meaning."""
    base = write_base(tmp_path / "base", CONFIGS[UNTIED])
    tensors = load_file(base / "model.safetensors")
    tensors[Q][7:10] = 0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    train(base, use_dora=True).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    trained = load_file(file)
    up, magnitude = (next(n for n in trained if "layers.0" in n and part in n) for part in ("lora_B", "magnitude"))
    trained[up][7:10] = 0
    trained[magnitude][7:10] = 0
    save_file(trained, file)
    exporter.merge(base, tmp_path / "adapter", tmp_path / "out", no_patch_rope=True)
    found = weights(tmp_path / "out")[Q]
    assert found.isfinite().all()
    assert torch.equal(found[7:10], torch.zeros_like(found[7:10]))
    trained[magnitude][8] = 0.25
    save_file(trained, file)
    with pytest.raises(InputError, match=rf"adapter: tensor {Q}: row 8 is zero, .*use_dora"):
        exporter.merge(base, tmp_path / "adapter", tmp_path / "no", no_patch_rope=True)
    assert not (tmp_path / "no").exists()
