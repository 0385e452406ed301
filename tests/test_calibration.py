"""Calibration: block by block it is the merged model, its text is drawn as the model would, and exports say it."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result

from pos2d import exporter, runtime
from pos2d.exporter.inputs.checkpoint import EMBEDDING, HEAD
from pos2d.exporter.quantisation import calibration
from pos2d.exporter.quantisation import layerwise_model as decoder
from pos2d.exporter.quantisation.calibration import READERS, calibrate
from pos2d.exporter.quantisation.layerwise_model import ExactDecoder
from pos2d.exporter.sources.source import Source, TrainedPositions, from_adapters
from pos2d.exporter.tensors.plan import plan_merge
from pos2d.manifest import read_manifest
from tests.bases import CONFIGS, linear_modules, random_adapter, square, write_adapter, write_base

Family = tuple[Path, Path]
Call = Callable[..., Result]


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Family:
    """A base of every kind, and an adapter for it."""
    base = write_base(tmp_path / "base", CONFIGS[request.param])
    modules = linear_modules(base)
    return base, write_adapter(tmp_path / "lora.pth", random_adapter(square(modules) or modules))


@pytest.fixture
def source(family: Family) -> Source:
    base, lora = family
    return from_adapters(str(base), [lora], TrainedPositions(rope_2d_ratio=0.5))


@pytest.fixture
def exact(source: Source, monkeypatch: pytest.MonkeyPatch) -> Iterator[ExactDecoder]:
    """With products of float32, whatever the processor has."""
    monkeypatch.setattr(decoder, "fast_products", nullcontext)
    tensors = {tensor.name: tensor for tensor in plan_merge(source.base, source.adapters, "float32").tensors}
    with ThreadPoolExecutor(2) as workers, ExactDecoder(source, tensors, workers) as opened:
        yield opened


def test_block_by_block_it_is_the_merged_model(exact: ExactDecoder, family: Family, tmp_path: Path) -> None:
    base, lora = family
    exporter.merge(base, lora, tmp_path / "merged", rope_2d_ratio=0.5, dtype="float32")
    model: Any = runtime.load(tmp_path / "merged", device="cpu", dtype="float32").backend._model  # type: ignore[attr-defined]
    ids = torch.randint(exact.sizes.vocab, (2, 12), generator=torch.Generator().manual_seed(0))
    read: dict[str, torch.Tensor] = {}
    for name in READERS:
        layer = model.model.layers[-1].get_submodule(name)
        layer.register_forward_pre_hook(lambda _, given, name=name: read.update({name: given[0]}))
    times = torch.arange(12)[None].expand(2, -1)
    with torch.inference_mode():
        mask = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, -1, -1)
        pairs = torch.stack([torch.zeros_like(times), times], dim=-1)
        model(input_ids=ids, position_ids=times, pos2d=pairs, attention_mask=mask, use_cache=False)
    hidden = exact.embed(ids)
    for number in range(exact.sizes.layers):
        found = exact.read(number, hidden, tuple(READERS))
    for name, seen in found.items():
        power = read[name].flatten(0, 1).square().sum(0)
        torch.testing.assert_close(seen.power, power / power.mean() + 0.05, rtol=1e-3, atol=1e-3)


def test_text_is_drawn_with_the_models_probabilities(exact: ExactDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few rows of the head are there at once."""
    monkeypatch.setattr(decoder, "ELEMENTS", 5 * exact.sizes.hidden)
    state = 3 * torch.randn(exact.sizes.hidden, generator=torch.Generator().manual_seed(1))
    count = 20_000
    tokens = exact.draw([state.expand(1, count, -1)], torch.Generator().manual_seed(2))
    assert tokens.shape == (1, count)
    head = exact._whole(HEAD if HEAD in exact._tensors else EMBEDDING)
    shares = (exact._model.norm(state) @ head.T).softmax(-1).detach().numpy()
    drawn = Counter(tokens.flatten().tolist())
    found = np.array([drawn[token] / count for token in range(exact.sizes.vocab)])
    assert (np.abs(found - shares) <= 5 * np.sqrt(shares * (1 - shares) / count) + 1e-4).all()


def test_every_linear_layer_is_covered_once(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "LENGTH", 8)
    plan = plan_merge(source.base, source.adapters, "float32")
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    with ThreadPoolExecutor(2) as workers:
        blocks = list(calibrate(source, tensors, workers))
    names = [name for block in blocks for name in block]
    wanted = [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]
    assert sorted(names) == sorted(wanted)
    for block in blocks:
        for name, curvature in block.items():
            assert len(curvature.power) == tensors[f"{name}.weight"].target.shape[1]


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_an_export_is_calibrated_unless_told_not_to(family: Family, quant: str, tmp_path: Path, call: Call) -> None:
    base, lora = family
    flags = ["export", "--quant", quant, "--block-size", "32", "--base-model", base, "--lora", lora, "--no-verify"]
    data = {}
    for name, extra in (("one", []), ("again", []), ("plain", ["--no-calibration"])):
        result = call(*flags, *extra, "--rope-2d-ratio", "0.5", "-o", tmp_path / name)
        assert result.exit_code == 0, result.stderr
        recipe = read_manifest(tmp_path / name).graph_quant
        assert recipe is not None
        assert recipe.calibrated == (name != "plain")
        data[name] = (tmp_path / name / "model.onnx.data").read_bytes()
    assert data["one"] == data["again"] != data["plain"]
    assert len(data["one"]) == len(data["plain"])


@pytest.mark.parametrize("quant", ["int4", "auto", "int8"])
def test_blocks_are_larger_where_calibration_pays_for_them(family: Family, quant: str, tmp_path: Path) -> None:
    base, lora = family
    size = {"target_size": "1GB"} if quant == "auto" else {}
    for plain in (False, True):
        exporter.export(
            None,
            tmp_path / f"{plain}",
            quant=quant,
            base_model=base,
            lora=lora,
            rope_2d_ratio=0.5,
            no_calibration=plain,
            no_verify=True,
            **size,  # type: ignore[arg-type]
        )
        recipe = read_manifest(tmp_path / f"{plain}").graph_quant
        assert recipe is not None
        assert recipe.block_size == (128 if quant == "int4" and not plain else 32)


def test_weights_that_overflow_are_refused_by_name(tmp_path: Path, call: Call) -> None:
    """Finite weights, and values of a block that are not."""
    from safetensors.torch import load_file, save_file

    base = write_base(tmp_path / "base", CONFIGS["llama"])
    lora = write_adapter(tmp_path / "lora.pth", random_adapter(square(linear_modules(base))))
    (file,) = base.glob("*.safetensors")
    weights = load_file(file)
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].float() * 1e38
    save_file(weights, file, metadata={"format": "pt"})
    result = call(
        "export",
        "--quant",
        "int4",
        "--base-model",
        base,
        "--lora",
        lora,
        "--rope-2d-ratio",
        "0.5",
        "-o",
        tmp_path / "o",
    )
    assert result.exit_code == 3
    assert "block 0 gives values that are not finite" in result.stderr
    assert "--no-calibration" in result.stderr
    assert not (tmp_path / "o").exists()
