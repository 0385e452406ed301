"""``--quant auto``: the file of weights fits its target size, and the layers that gain most have 8 bits."""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pos2d import exporter
from pos2d.errors import InputError, UsageError
from pos2d.exporter.formats.onnx import format as onnx_format
from pos2d.exporter.formats.onnx.weight_layout import lay_out
from pos2d.exporter.formats.options import ExportOptions
from pos2d.exporter.quantisation.allocation import (
    FusionGroup,
    LayerSensitivity,
    fusion_groups,
    longest_prefix,
    measure,
    ranked,
    with_8_bits,
)
from pos2d.exporter.quantisation.blockwise import dequantise, quantise
from pos2d.manifest import read_manifest
from pos2d.onnx_io import DATA_FILE
from pos2d.recipes import GraphRecipe
from pos2d.sources.positions import TrainedPositions
from pos2d.sources.source import Source, from_adapters, from_merged
from pos2d.sources.tensors.tensor_plan import plan_tensors
from pos2d.units import size_text
from tests.bases import CONFIGS, linear_modules, random_adapter, write_adapter, write_base
from tests.bounds import gamma

BLOCK = 16


@pytest.fixture(scope="module", params=["llama", "qwen3 with biases"])
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter for it: one base with a tied head, and one with a separate head and biases."""
    root = tmp_path_factory.mktemp("inputs")
    base = write_base(root / "base", CONFIGS[request.param])
    return base, write_adapter(root / "lora.pth", random_adapter(linear_modules(base)))


@pytest.fixture(scope="module")
def source(inputs: tuple[Path, Path]) -> Source:
    return from_adapters(*inputs, TrainedPositions(0.5))


def planned(
    source: Source, quant: str, size: int | str | None = None, skipped: str | None = None, floating: str = ""
) -> tuple[GraphRecipe, int]:
    """The recipe, and the bytes of the weights."""
    options: dict[str, Any] = {"quant": quant, "skip_modules": skipped, "float_activations": floating}
    target = None if size is None else str(size)
    plan = onnx_format.plan(source, ExportOptions(block_size=BLOCK, target_size=target, **options))
    assert plan.recipe is not None
    return plan.recipe, plan.nbytes


def modules_with_8_bits(recipe: GraphRecipe) -> set[str]:
    return {module for module, bits in recipe.bits.items() if bits == 8}


def budgets(source: Source, count: int = 9, skipped: str | None = None) -> list[int]:
    """Evenly spaced sizes from all layers at 4 bits to all at 8."""
    least, most = (planned(source, quant, skipped=skipped)[1] for quant in ("int4", "int8"))
    return [least + (most - least) * step // (count - 1) for step in range(count)]


def nbytes_of(source: Source, recipe: GraphRecipe) -> int:
    """The bytes of the weights with ``recipe``."""
    tensors = plan_tensors(source.base, source.adapters, "float32").tensors
    return lay_out({t.name: t.shape for t in tensors}, source.base.sizes, "float32", recipe).nbytes


def ranking_of(source: Source) -> list[FusionGroup]:
    """All groups of layers, in the order in which they get 8 bits."""
    merged = plan_tensors(source.base, source.adapters, "float32")
    int4, _ = planned(source, "int4")
    modules = [module for module in int4.bits if module not in modules_with_8_bits(int4)]
    return ranked(fusion_groups(modules), measure(source, merged, modules, BLOCK, "float32"))


def test_the_weights_fit_and_with_the_next_group_they_would_not(source: Source) -> None:
    ranking, (int4, _) = ranking_of(source), planned(source, "int4")
    for budget in budgets(source):
        recipe, nbytes = planned(source, "auto", budget)
        assert nbytes <= budget
        count = next(n for n in range(len(ranking) + 1) if with_8_bits(int4, ranking[:n]).bits == recipe.bits)
        assert count == len(ranking) or nbytes_of(source, with_8_bits(int4, ranking[: count + 1])) > budget


def test_a_larger_size_takes_8_bits_from_no_layer(source: Source) -> None:
    chosen = [modules_with_8_bits(planned(source, "auto", budget)[0]) for budget in budgets(source, 17)]
    assert all(before <= after for before, after in pairwise(chosen))
    assert len({frozenset(layers) for layers in chosen}) > 4


def test_the_extremes_are_all_4_and_all_8_bits(source: Source) -> None:
    least, *_, most = budgets(source)
    # Tensors begin at whole pages: the 8 bits of a very small layer may fit into a gap.
    assert planned(source, "auto", least)[1] == least
    for budget in (most, 10 * most):
        assert planned(source, "auto", budget)[0].bits == planned(source, "int8")[0].bits
    assert modules_with_8_bits(planned(source, "auto", most - 1)[0]) < modules_with_8_bits(planned(source, "int8")[0])


def test_a_size_that_is_too_small_is_refused_with_the_least_one(source: Source) -> None:
    int4, nbytes = planned(source, "int4")
    all_4_bits = replace(int4, bits=dict.fromkeys(int4.bits, 4))
    least = nbytes_of(source, all_4_bits)
    assert least < nbytes
    # The head falls back to 4 bits before a size is refused.
    for budget in (least, nbytes - 1):
        assert planned(source, "auto", budget)[0].bits == all_4_bits.bits
    with pytest.raises(UsageError, match=f"give at least {least} bytes"):
        planned(source, "auto", least - 1)
    with pytest.raises(UsageError, match="cannot be read"):
        planned(source, "auto", "much")


def test_layers_that_read_the_same_input_have_the_same_bits(source: Source) -> None:
    for budget in budgets(source):
        recipe, _ = planned(source, "auto", budget)
        for group in fusion_groups(list(recipe.bits)):
            assert len({recipe.bits[module] for module in group}) == 1
    assert fusion_groups(
        ["m.0.self_attn.q_proj", "m.0.self_attn.v_proj", "m.0.self_attn.o_proj", "m.0.mlp.up_proj"]
    ) == [
        ("m.0.self_attn.q_proj", "m.0.self_attn.v_proj"),
        ("m.0.self_attn.o_proj",),
        ("m.0.mlp.up_proj",),
    ]


def test_skipped_layers_are_left_out_and_layers_with_float_activations_keep_4_bits(source: Source) -> None:
    size = budgets(source, skipped="k_proj")[4]
    for budget in (size, 1 << 30):
        recipe, nbytes = planned(source, "auto", budget, "k_proj", "up_proj")
        assert nbytes <= budget
        assert not [module for module in recipe.bits if module.endswith("k_proj")]
        assert {recipe.bits[module] for module in recipe.float_activations} == {4}
        assert len(modules_with_8_bits(recipe)) > 1
    assert all(bits == 8 for module, bits in recipe.bits.items() if module not in recipe.float_activations)


def test_sensitivities_are_measured_on_the_exact_sum(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    exporter.merge(*inputs, tmp_path / "merged", dtype="float32", rope_2d_ratio=0.5)
    source = from_adapters(*inputs, TrainedPositions(0.5))
    merged = plan_tensors(source.base, source.adapters, "float32")
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    for module, sensitivity in measure(source, merged, modules, BLOCK, "float32").items():
        weight = weights[f"{module}.weight"]
        stored = (dequantise(*quantise(weight, bits, BLOCK), bits, weight.shape[1]) for bits in (4, 8))
        errors = [values.double() - weight.double() for values in stored]
        error_4_bits, error_8_bits = (float(error.square().sum()) for error in errors)
        assert sensitivity.elements == weight.numel()
        # The file stores the sum rounded to float32.
        square = float(weight.double().square().sum())
        assert sensitivity.weight_square == pytest.approx(square, rel=gamma(3, torch.float32))
        bound = sum(2 * gamma(4, torch.float32) * float((error * weight).abs().sum()) for error in errors)
        assert sensitivity.error_reduction == pytest.approx(error_4_bits - error_8_bits, abs=bound)


def test_relative_errors_decide_and_of_equal_ones_the_smallest_layer_is_first() -> None:
    sensitivities = {
        "large": LayerSensitivity(100, 100.0, 1.0),
        "scaled": LayerSensitivity(100, 1e6, 1e4),
        "worse": LayerSensitivity(100, 100.0, 2.0),
        "small": LayerSensitivity(10, 10.0, 0.1),
        "zero": LayerSensitivity(10, 0.0, 0.0),
    }
    groups: list[FusionGroup] = [(name,) for name in sensitivities]
    assert ranked(groups, sensitivities) == [("small",), ("worse",), ("large",), ("scaled",), ("zero",)]


@pytest.mark.parametrize(("budget", "count"), [(10, 0), (13, 0), (14, 1), (18, 1), (19, 2), (20, 3), (99, 3)])
def test_no_group_is_skipped_for_a_smaller_one(budget: int, count: int) -> None:
    ranking: list[FusionGroup] = [("a",), ("b",), ("c",)]
    sizes: dict[FusionGroup, int] = {("a",): 4, ("b",): 5, ("c",): 1}

    def size_of(groups: Sequence[FusionGroup]) -> int:
        return 10 + sum(sizes[group] for group in groups)

    assert longest_prefix(ranking, size_of, budget) == ranking[:count]


def test_a_merged_directory_gets_the_same_bits_and_the_report_counts_them(
    inputs: tuple[Path, Path], source: Source, tmp_path: Path
) -> None:
    base, lora = inputs
    flags: dict[str, Any] = {"quant": "auto", "block_size": BLOCK, "no_verify": True}
    size = budgets(source)[4]
    exporter.merge(base, lora, tmp_path / "merged", dtype="float32", rope_2d_ratio=0.5)
    exporter.export(tmp_path / "merged", tmp_path / "two", target_size=str(size), **flags)
    report = exporter.export(
        None, tmp_path / "one", base_model=base, lora=lora, rope_2d_ratio=0.5, target_size=f"{size / 1e3}kB", **flags
    )
    recipes = [read_manifest(tmp_path / name).graph_quant for name in ("one", "two")]
    assert recipes[0] == recipes[1] == planned(source, "auto", size)[0]
    assert recipes[0] is not None
    assert recipes[0] == planned(from_merged(tmp_path / "merged"), "auto", size)[0]
    assert report.weights_bytes == (tmp_path / "one" / DATA_FILE).stat().st_size <= size
    layers = len(recipes[0].bits)
    match = re.search(r"auto, .*; 8 bits for (\d+) of (\d+) layers, weights of (\S+ \S+);", report.summary())
    assert match is not None
    assert match.groups() == (
        str(len(modules_with_8_bits(recipes[0]))),
        str(layers),
        size_text(report.weights_bytes),
    )


def test_values_that_are_not_finite_are_refused(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, lora = inputs
    exporter.merge(base, lora, tmp_path / "merged", dtype="float32", rope_2d_ratio=0.5)
    source = from_merged(tmp_path / "merged")
    size = budgets(source)[4]
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(weights, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"down_proj\.weight has NaN"):
        planned(source, "auto", size)
