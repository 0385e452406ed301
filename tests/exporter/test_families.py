"""Every family, rope type and shape: the artifacts against transformers' own model with the trainer's rotary loop."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pos2d import exporter, runtime
from pos2d.families import CLASS_NAMES
from pos2d.layout import Layout, build_layout
from tests.bases import CONFIGS, linear_modules, random_adapter, square, write_adapter, write_base
from tests.bounds import logits_bound

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
CONTEXT = [20, 21, 22, 23]


class TrainerRotary(torch.nn.Module):
    """The rule as the trainer states it, a loop over frequencies, around the stock module's frequencies."""

    def __init__(self, stock: Any, pair_indices: list[int], layout: Layout) -> None:
        super().__init__()
        self.stock, self.pair_indices, self.layout = stock, pair_indices, layout

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        position, branch, time = (torch.tensor(v, dtype=torch.float32) for v in self.positions())
        angles = torch.outer(position, self.stock.inv_freq)
        for order, index in enumerate(self.pair_indices):
            chosen = branch if order % 2 == 0 else time
            angles[:, index - 1] = chosen * self.stock.inv_freq[index - 1]
        angles = torch.cat((angles, angles), dim=-1)[None]
        return angles.cos() * self.stock.attention_scaling, angles.sin() * self.stock.attention_scaling

    def positions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.layout.positions, self.layout.branches, self.layout.times


def stock_logits(base: Path, adapter: dict[str, torch.Tensor], pair_indices: list[int], layout: Layout) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name in {key.split(".lora.")[0] for key in adapter}:
            modules[name].weight += adapter[f"{name}.lora.B.weight"] @ adapter[f"{name}.lora.A.weight"]
        model.model.rotary_emb = TrainerRotary(model.model.rotary_emb, pair_indices, layout)
        bias = torch.where(torch.tensor(layout.mask()), 0.0, torch.finfo(torch.float32).min)
        logits: np.ndarray = model(torch.tensor(layout.ids)[None], attention_mask=bias[None, None]).logits.numpy()
    return logits


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda name: name.replace(" ", "_"))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), CONFIGS[request.param])


def test_artifacts_agree_with_the_stock_model_and_the_trainers_loop(base: Path, tmp_path: Path) -> None:
    modules = linear_modules(base)
    adapter = random_adapter(modules)
    exporter.merge(base, write_adapter(tmp_path / "lora.pth", adapter), tmp_path / "merged", pair_indices=[6, 3, 5, 1])
    exporter.export(tmp_path / "merged", tmp_path / "onnx", no_verify=True)
    for kind in ("merged", "onnx"):
        model = runtime.load(tmp_path / kind)
        layout = build_layout(PROMPTS, model.manifest.rope_2d, CONTEXT)
        expected = stock_logits(base, adapter, [6, 3, 5, 1], layout)
        found = model.logits(layout.ids, layout.positions, layout.pos2d)
        np.testing.assert_allclose(found, expected, rtol=0, atol=logits_bound(expected))


def test_without_2d_rope_the_artifact_is_the_ordinary_model(base: Path, tmp_path: Path) -> None:
    adapter = random_adapter(square(linear_modules(base)) or linear_modules(base))
    exporter.merge(base, write_adapter(tmp_path / "lora.pth", adapter), tmp_path / "merged", no_patch_rope=True)
    model = runtime.load(tmp_path / "merged")
    layout = build_layout(PROMPTS[:1], model.manifest.rope_2d)
    expected = stock_logits(base, adapter, [], layout)
    np.testing.assert_allclose(model.logits(layout.ids), expected, rtol=0, atol=logits_bound(expected))


def test_every_family_has_a_tiny_base() -> None:
    assert {config.model_type for config in CONFIGS.values()} == set(CLASS_NAMES)
