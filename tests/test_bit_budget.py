"""``--quant auto``: the file of weights keeps to its size, and 8 bits go where they buy most."""

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
from pos2d.exporter.formats.onnx.format import plan_onnx
from pos2d.exporter.formats.onnx.weight_layout import DATA_FILE, lay_out_weights
from pos2d.exporter.formats.wanted import Wanted
from pos2d.exporter.quantisation.allocation import Sensitivity, Unit, in_order, longest, measure, units_of, widen
from pos2d.exporter.quantisation.blockwise import dequantise, quantise
from pos2d.exporter.sources.source import Source, TrainedPositions, from_adapters, from_merged
from pos2d.exporter.tensors.plan import plan_merge
from pos2d.graph_recipe import GraphRecipe
from pos2d.manifest import read_manifest
from tests.bases import CONFIGS, linear_modules, random_adapter, write_adapter, write_base

BLOCK = 16


@pytest.fixture(scope="module", params=["llama", "qwen3 with biases"])
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter for it: with a tied head, and with one of its own and biases."""
    root = tmp_path_factory.mktemp("inputs")
    base = write_base(root / "base", CONFIGS[request.param])
    return base, write_adapter(root / "lora.pth", random_adapter(linear_modules(base)))


@pytest.fixture(scope="module")
def source(inputs: tuple[Path, Path]) -> Source:
    return from_adapters(*inputs, TrainedPositions(0.5))


def planned(
    source: Source, quant: str, size: int | None = None, skipped: str | None = None, floating: str = ""
) -> tuple[GraphRecipe, int]:
    """The recipe, and what the weights take."""
    target = None if size is None else str(size)
    plan = plan_onnx(source, Wanted("onnx", quant, BLOCK, skipped, floating, target, "auto", None, True))
    assert plan.recipe is not None
    return plan.recipe, plan.nbytes


def wide(recipe: GraphRecipe) -> set[str]:
    return {module for module, bits in recipe.bits.items() if bits == 8}


def budgets(source: Source, count: int = 9, skipped: str | None = None) -> list[int]:
    """From all layers at 4 bits to all at 8."""
    least, most = (planned(source, quant, skipped=skipped)[1] for quant in ("int4", "int8"))
    return [least + (most - least) * step // (count - 1) for step in range(count)]


def line_of(source: Source) -> list[Unit]:
    """All layers in the order in which they are given 8 bits."""
    merged = plan_merge(source.base, source.adapters, "float32")
    few, _ = planned(source, "int4")
    narrow = [module for module in few.bits if module not in wide(few)]
    return in_order(units_of(narrow), measure(source, merged, narrow, BLOCK, "float32"))


def test_the_weights_keep_to_the_size_and_the_next_in_line_would_not(source: Source) -> None:
    line, (few, _) = line_of(source), planned(source, "int4")
    merged = plan_merge(source.base, source.adapters, "float32")
    for budget in budgets(source):
        recipe, nbytes = planned(source, "auto", budget)
        assert nbytes <= budget
        count = next(n for n in range(len(line) + 1) if widen(few, line[:n]).bits == recipe.bits)
        more = lay_out_weights(merged, source.base.sizes, "float32", widen(few, line[: count + 1]))
        assert count == len(line) or more.nbytes > budget


def test_a_larger_size_takes_8_bits_from_no_layer(source: Source) -> None:
    chosen = [wide(planned(source, "auto", budget)[0]) for budget in budgets(source, 17)]
    assert all(before <= after for before, after in pairwise(chosen))
    assert len({frozenset(layers) for layers in chosen}) > 4


def test_the_ends_are_all_4_and_all_8_bits(source: Source) -> None:
    least, *_, most = budgets(source)
    # Tensors begin at whole pages: a layer that small may find the room for 8 bits in a gap.
    assert planned(source, "auto", least)[1] == least
    for enough in (most, 10 * most):
        assert planned(source, "auto", enough)[0].bits == planned(source, "int8")[0].bits
    assert wide(planned(source, "auto", most - 1)[0]) < wide(planned(source, "int8")[0])


def test_less_than_the_least_is_refused_with_the_least(source: Source) -> None:
    (few, nbytes), merged = planned(source, "int4"), plan_merge(source.base, source.adapters, "float32")
    narrow = replace(few, bits=dict.fromkeys(few.bits, 4))
    least = lay_out_weights(merged, source.base.sizes, "float32", narrow).nbytes
    assert least < nbytes
    # The head gives up its 8 bits before anything is refused.
    for budget in (least, nbytes - 1):
        assert planned(source, "auto", budget)[0].bits == narrow.bits
    with pytest.raises(UsageError, match=f"give at least {least} bytes"):
        planned(source, "auto", least - 1)
    with pytest.raises(UsageError, match="cannot be read"):
        plan_onnx(source, Wanted("onnx", "auto", None, None, "", "much", "auto", None, True))


def test_layers_that_read_the_same_have_the_same_bits(source: Source) -> None:
    for budget in budgets(source):
        recipe, _ = planned(source, "auto", budget)
        for unit in units_of(list(recipe.bits)):
            assert len({recipe.bits[module] for module in unit}) == 1
    assert units_of(["m.0.self_attn.q_proj", "m.0.self_attn.v_proj", "m.0.self_attn.o_proj", "m.0.mlp.up_proj"]) == [
        ("m.0.self_attn.q_proj", "m.0.self_attn.v_proj"),
        ("m.0.self_attn.o_proj",),
        ("m.0.mlp.up_proj",),
    ]


def test_skipped_layers_stay_out_and_those_with_float_activations_keep_4_bits(source: Source) -> None:
    size = budgets(source, skipped="k_proj")[4]
    for budget in (size, 1 << 30):
        recipe, nbytes = planned(source, "auto", budget, "k_proj", "up_proj")
        assert nbytes <= budget
        assert not [module for module in recipe.bits if module.endswith("k_proj")]
        assert {recipe.bits[module] for module in recipe.float_activations} == {4}
        assert len(wide(recipe)) > 1
    assert all(bits == 8 for module, bits in recipe.bits.items() if module not in recipe.float_activations)


def test_what_is_measured_are_the_errors_of_the_exact_sum(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    exporter.merge(*inputs, tmp_path / "merged", dtype="float32", rope_2d_ratio=0.5)
    source = from_adapters(*inputs, TrainedPositions(0.5))
    merged = plan_merge(source.base, source.adapters, "float32")
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    for module, found in measure(source, merged, modules, BLOCK, "float32").items():
        weight = weights[f"{module}.weight"]
        stored = (dequantise(*quantise(weight, bits, BLOCK), bits, weight.shape[1]) for bits in (4, 8))
        few, many = (float((values - weight).double().square().sum()) for values in stored)
        assert found.elements == weight.numel()
        assert found.weight_square == pytest.approx(float(weight.double().square().sum()), rel=1e-6)
        assert found.gain == pytest.approx(few - many, rel=1e-4)


def test_relative_errors_decide_and_small_layers_win_among_equals() -> None:
    measured = {
        "large": Sensitivity(100, 100.0, 1.0),
        "scaled": Sensitivity(100, 1e6, 1e4),
        "worse": Sensitivity(100, 100.0, 2.0),
        "small": Sensitivity(10, 10.0, 0.1),
        "zero": Sensitivity(10, 0.0, 0.0),
    }
    units: list[Unit] = [(name,) for name in measured]
    assert in_order(units, measured) == [("small",), ("worse",), ("large",), ("scaled",), ("zero",)]


@pytest.mark.parametrize(("budget", "count"), [(10, 0), (13, 0), (14, 1), (18, 1), (19, 2), (20, 3), (99, 3)])
def test_nothing_is_passed_over(budget: int, count: int) -> None:
    order: list[Unit] = [("a",), ("b",), ("c",)]
    weights: dict[Unit, int] = {("a",): 4, ("b",): 5, ("c",): 1}

    def size_of(units: Sequence[Unit]) -> int:
        return 10 + sum(weights[unit] for unit in units)

    assert longest(order, size_of, budget) == order[:count]


def test_a_merged_directory_leads_to_the_same_bits_and_the_report_says_which(
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
    said = re.search(r"auto, .*; 8 bits for (\d+) of (\d+) layers, weights of (\S+) MB", report.summary())
    assert said is not None
    assert said.groups() == (str(len(wide(recipes[0]))), str(layers), f"{report.weights_bytes / 1e6:.1f}")


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
