"""Calibration: the layerwise model is the merged model, samples as it does, and exports record it."""

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
from pos2d.exporter.quantisation import calibration, layerwise_model
from pos2d.exporter.quantisation.calibration import LAYERS_BY_INPUT, calibrate
from pos2d.exporter.quantisation.gptq import DAMPING
from pos2d.exporter.quantisation.layerwise_model import LayerwiseModel
from pos2d.manifest import read_manifest
from pos2d.sources.checkpoints.checkpoint import EMBEDDING, HEAD
from pos2d.sources.positions import TrainedPositions
from pos2d.sources.source import Source, from_adapters
from pos2d.sources.tensors.tensor_plan import plan_tensors
from tests.bases import CONFIGS, linear_modules, random_adapter, square, write_adapter, write_base
from tests.bounds import SIGMAS, logits_bound

Family = tuple[Path, Path]
Call = Callable[..., Result]


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Family:
    """A base of each family, and an adapter for it."""
    base = write_base(tmp_path / "base", CONFIGS[request.param])
    modules = linear_modules(base)
    return base, write_adapter(tmp_path / "lora.pth", random_adapter(square(modules) or modules))


@pytest.fixture
def source(family: Family) -> Source:
    base, lora = family
    return from_adapters(str(base), [lora], TrainedPositions(rope_2d_ratio=0.5))


@pytest.fixture
def layerwise(source: Source, monkeypatch: pytest.MonkeyPatch) -> Iterator[LayerwiseModel]:
    """The model with float32 products, whatever the processor has."""
    monkeypatch.setattr(layerwise_model, "reduced_precision_matmul", nullcontext)
    tensors = {tensor.name: tensor for tensor in plan_tensors(source.base, source.adapters, "float32").tensors}
    with ThreadPoolExecutor(2) as workers, LayerwiseModel(source, tensors, workers) as model:
        yield model


def test_the_layerwise_model_is_the_merged_model(layerwise: LayerwiseModel, family: Family, tmp_path: Path) -> None:
    base, lora = family
    exporter.merge(base, lora, tmp_path / "merged", rope_2d_ratio=0.5, dtype="float32")
    model: Any = runtime.load(tmp_path / "merged", device="cpu", dtype="float32").backend._model  # type: ignore[attr-defined]
    ids = torch.randint(layerwise.sizes.vocab, (2, 12), generator=torch.Generator().manual_seed(0))
    inputs: dict[str, torch.Tensor] = {}
    for name in LAYERS_BY_INPUT:
        layer = model.model.layers[-1].get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    times = torch.arange(12)[None].expand(2, -1)
    with torch.inference_mode():
        mask = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, -1, -1)
        pairs = torch.stack([torch.zeros_like(times), times], dim=-1)
        model(input_ids=ids, position_ids=times, pos2d=pairs, attention_mask=mask, use_cache=False)
    hidden = layerwise.embed(ids)
    for index in range(layerwise.sizes.layers):
        hessians = layerwise.run_layer(index, hidden, tuple(LAYERS_BY_INPUT))
    assert set(hessians) == set(LAYERS_BY_INPUT)
    for name, hessian in hessians.items():
        diagonal = inputs[name].flatten(0, 1).square().sum(0)
        expected = diagonal / diagonal.mean() + DAMPING
        # Activations have the error of logits, and their squares twice as much.
        torch.testing.assert_close(hessian.diagonal, expected, rtol=0, atol=2 * logits_bound(expected))


def test_tokens_are_sampled_with_the_models_probabilities(
    layerwise: LayerwiseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only five rows of the head are in memory at a time."""
    monkeypatch.setattr(layerwise_model, "CHUNK_ELEMENTS", 5 * layerwise.sizes.hidden)
    state = 3 * torch.randn(layerwise.sizes.hidden, generator=torch.Generator().manual_seed(1))
    count = 20_000
    tokens = layerwise.sample_next([state.expand(1, count, -1)], torch.Generator().manual_seed(2))
    assert tokens.shape == (1, count)
    head = layerwise._float32_tensor(HEAD if HEAD in layerwise._tensors else EMBEDDING)
    expected = (layerwise._model.norm(state) @ head.T).softmax(-1).detach().numpy()
    counts = Counter(tokens.flatten().tolist())
    frequencies = np.array([counts[token] / count for token in range(layerwise.sizes.vocab)])
    # Counts of rare tokens do not follow a normal distribution: two draws more are allowed.
    assert (np.abs(frequencies - expected) <= SIGMAS * np.sqrt(expected * (1 - expected) / count) + 2 / count).all()


def test_every_linear_layer_gets_one_hessian(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SEQUENCE_LENGTH", 8)
    plan = plan_tensors(source.base, source.adapters, "float32")
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    with ThreadPoolExecutor(2) as workers, LayerwiseModel(source, tensors, workers) as model:
        layers = list(calibrate(model))
    names = [name for hessians in layers for name in hessians]
    assert sorted(names) == sorted(name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight"))
    for hessians in layers:
        for name, hessian in hessians.items():
            assert len(hessian.diagonal) == tensors[f"{name}.weight"].shape[1]


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_an_export_is_calibrated_by_default(family: Family, quant: str, tmp_path: Path, call: Call) -> None:
    base, lora = family
    flags = ["export", "--quant", quant, "--block-size", "32", "--base-model", base, "--lora", lora, "--no-verify"]
    data = {}
    for name, calibration_flags in (("one", []), ("again", []), ("plain", ["--no-calibration"])):
        result = call(*flags, *calibration_flags, "--rope-2d-ratio", "0.5", "-o", tmp_path / name)
        assert result.exit_code == 0, result.stderr
        recipe = read_manifest(tmp_path / name).graph_quant
        assert recipe is not None
        assert recipe.calibrated == (name != "plain")
        data[name] = (tmp_path / name / "model.onnx.data").read_bytes()
    assert data["one"] == data["again"] != data["plain"]
    assert len(data["one"]) == len(data["plain"])


@pytest.mark.parametrize("quant", ["int4", "auto", "int8"])
def test_only_calibrated_int4_has_large_blocks_by_default(family: Family, quant: str, tmp_path: Path) -> None:
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
    """The weights are finite, and the hidden states after a decoder layer are not."""
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
    assert "decoder layer 0 gives values that are not finite" in result.stderr
    assert "--no-calibration" in result.stderr
    assert not (tmp_path / "o").exists()
