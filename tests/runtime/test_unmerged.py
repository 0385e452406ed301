"""A base with its adapters beside it: the logits are those of PEFT's own unmerged model, and no weight is a sum."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.backends.torch.unmerged import UnmergedLinear, load_unmerged, split_adapters
from pos2d.runtime.model.model import Model
from pos2d.runtime.opening.opened_model import OpenedModel, open_model
from pos2d.sources.base_options import BaseOptions
from pos2d.sources.positions import TrainedPositions
from tests.bases import CONFIGS, linear_modules, random_adapter, write_adapter, write_base
from tests.bounds import logits_bound
from tests.sources.test_peft import ALL, TIED, UNTIED, train
from tests.sources.test_peft import pytestmark as pytestmark

IDS = [[5, 17, 250, 3, 99, 42, 7]]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear layers": (UNTIED, {"target_modules": ALL, "lora_alpha": 3}),
    "rslora": (UNTIED, {"use_rslora": True, "r": 3, "target_modules": ["q_proj", "down_proj"]}),
    "dora": (UNTIED, {"use_dora": True, "target_modules": ["k_proj", "gate_proj", "down_proj"], "bias": "lora_only"}),
    "biases": (UNTIED, {"bias": "all", "target_modules": ["q_proj", "o_proj"]}),
    "saved whole": (UNTIED, {"modules_to_save": ["embed_tokens", "lm_head", "model.norm"]}),
    "head of a tied base": (TIED, {"target_modules": ["q_proj", "lm_head"]}),
    "embedding of a tied base": (TIED, {"target_modules": ["v_proj", "embed_tokens"]}),
}


def opened(base: Path, *lora: str, **positions: Any) -> OpenedModel:
    return open_model(None, BaseOptions(base_model=str(base), lora=lora), TrainedPositions(**positions))


def loaded(model: OpenedModel) -> Model:
    backend = load_unmerged(model, LoadOptions(device="cpu", dtype="float32"))
    return Model(model.directory, model.manifest, backend)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: write_base(root / name.replace(" ", "-"), CONFIGS[name]) for name in (UNTIED, TIED)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_peft(bases: dict[str, Path], tmp_path: Path, variant: str) -> None:
    name, settings = VARIANTS[variant]
    trained = train(bases[name], **settings)
    trained.save_pretrained(tmp_path / "peft")
    with torch.no_grad():
        expected = trained.eval()(torch.tensor(IDS)).logits.numpy()
    found = loaded(opened(bases[name], str(tmp_path / "peft"))).logits(IDS)
    assert np.abs(found - expected).max() <= logits_bound(expected)
    before = AutoModelForCausalLM.from_pretrained(bases[name])(torch.tensor(IDS)).logits.detach().numpy()
    assert np.abs(before - expected).max() > 100 * logits_bound(expected)


def test_several_adapters_stand_beside_the_bytes_of_the_base(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases[UNTIED]
    paths = [
        write_adapter(tmp_path / f"{seed}.pth", random_adapter(linear_modules(base), seed=seed)) for seed in (1, 2)
    ]
    model = opened(base, f"{paths[0]}=0.5", str(paths[1]), rope_2d_ratio=0.5)
    assert model.source is not None
    beside, rest = split_adapters(model.source)
    assert set(beside) == set(linear_modules(base))
    assert not any(adapter.deltas for adapter in rest.adapters)
    backend = load_unmerged(model, LoadOptions(device="cpu", dtype="float32"))
    stored = load_file(base / "model.safetensors")
    for module in beside:
        layer = backend._model.get_submodule(module)
        assert isinstance(layer, UnmergedLinear)
        assert [scale for _, _, scale in layer.factors] == [0.5, 1.0]
        assert torch.equal(layer.layer.weight, stored[f"{module}.weight"])
