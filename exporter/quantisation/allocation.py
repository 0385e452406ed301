"""Which layers of a graph get 8 bits in place of 4, where the file of weights has a size to keep (``--quant auto``)."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pos2d.errors import UsageError
from pos2d.exporter.files.parallel import single_threaded_torch, worker_count
from pos2d.exporter.files.tensor_io import TensorFile, opened
from pos2d.exporter.formats.onnx.weight_layout import SIDE_BY_SIDE, lay_out_weights
from pos2d.exporter.inputs.checkpoint import LM_HEAD, SAFETENSORS_NAMES
from pos2d.exporter.quantisation.encodings import BlockBits
from pos2d.exporter.quantisation.writing import exact_rows
from pos2d.exporter.sources.source import Source
from pos2d.exporter.tensors.plan import MergePlan, PlannedTensor
from pos2d.graph_recipe import GraphRecipe
from pos2d.progress import Progress
from pos2d.units import parse_size, size_text

if TYPE_CHECKING:
    import torch

# Layers that read the same input and get their bits together: they stay one product.
Unit = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Sums over the values of a layer: the squares of the weight, and by how much less the squares of the errors are
    with 8 bits than with 4."""

    elements: int = 0
    weight_square: float = 0.0
    gain: float = 0.0

    def __add__(self, other: "Sensitivity") -> "Sensitivity":
        return Sensitivity(
            self.elements + other.elements, self.weight_square + other.weight_square, self.gain + other.gain
        )


def spend(source: Source, plan: MergePlan, recipe: GraphRecipe, dtype: str, target_size: str) -> GraphRecipe:
    """``recipe`` with 8 bits for as many layers as the file of weights has room for in ``target_size``.

    Layers with float activations keep 4 bits: with 8 they could not have them. The head is the first to get 8, whatever
    it costs, and has 4 only where nothing else fits.

    Raises:
        UsageError: a size that cannot be read, or in which not even ``recipe`` itself has room.
        InputError: values that are not finite.
    """
    budget = parse_size(target_size, "--target-size")
    units = units_of([m for m, bits in recipe.bits.items() if bits == 4 and m not in recipe.float_activations])

    def size_of(widened: Sequence[Unit], of: GraphRecipe = recipe) -> int:
        return lay_out_weights(plan, source.base.sizes, dtype, widen(of, widened)).nbytes

    if budget < size_of(()):
        narrow = replace(recipe, bits={**recipe.bits, **({LM_HEAD: 4} if LM_HEAD in recipe.bits else {})})
        least = size_of((), narrow)
        if budget >= least:
            return narrow
        raise UsageError(
            f"--target-size {target_size} is less than the weights take with 4 bits; give at least {least} bytes "
            f"({size_text(least)}), or another --block-size"
        )
    if size_of(units) <= budget:
        return widen(recipe, units)
    measured = measure(source, plan, [module for unit in units for module in unit], recipe.block_size, dtype)
    return widen(recipe, longest(in_order(units, measured), size_of, budget))


def units_of(modules: Sequence[str]) -> list[Unit]:
    """``modules`` by what they read, in their order."""
    units: dict[str, list[str]] = {}
    for module in modules:
        block, _, layer = module.rpartition(".")
        together = layer in SIDE_BY_SIDE.get(block.rpartition(".")[2], ())
        units.setdefault(block if together else module, []).append(module)
    return [tuple(unit) for unit in units.values()]


def widen(recipe: GraphRecipe, units: Sequence[Unit]) -> GraphRecipe:
    """``recipe`` with 8 bits for every layer of ``units``."""
    return replace(recipe, bits={**recipe.bits, **{module: 8 for unit in units for module in unit}})


def in_order(units: Sequence[Unit], measured: Mapping[str, Sensitivity]) -> list[Unit]:
    """The units by what 8 bits buy them, the most first; of equal ones the first of the model."""
    return sorted(units, key=lambda unit: -score([measured[module] for module in unit]))


def score(layers: Sequence[Sensitivity]) -> float:
    """How much less relative error a byte more in these layers buys."""
    # Relative to the weights, and not to what adapters add: alike in small files, in large ones a quarter less KL, and
    # the same choice whether the sum was merged before or not. Small layers of equal error come first, which is why
    # those of the attention need no rule of their own (measured, benchmarks/mixed_bits.py).
    gains = (layer.gain / layer.weight_square for layer in layers if layer.weight_square)
    return sum(gains) / (sum(layer.elements for layer in layers) / 2)


def longest(order: Sequence[Unit], size_of: Callable[[Sequence[Unit]], int], budget: int) -> Sequence[Unit]:
    """As much of ``order``, from its beginning, as has a size within ``budget``; an empty one has.

    Nothing is passed over for something smaller that would fit: a larger budget then never takes 8 bits from a layer.
    """
    return order[: bisect_right(range(len(order) + 1), budget, key=lambda count: size_of(order[:count])) - 1]


def measure(source: Source, plan: MergePlan, modules: Sequence[str], block: int, dtype: str) -> dict[str, Sensitivity]:
    """Of the exact sums, each read once and block by block.

    Raises:
        InputError: values that are not finite.
    """
    tensors = {tensor.name.removesuffix(".weight"): tensor for tensor in plan.tensors}
    chosen = sorted((tensors[module] for module in modules), key=lambda tensor: -tensor.source.nbytes)
    with (
        Progress("weighing layers", sum(tensor.source.nbytes for tensor in chosen), unit="bytes") as progress,
        single_threaded_torch(),
        opened(source.base.directory, {tensor.source.file for tensor in chosen}) as files,
        ThreadPoolExecutor(worker_count()) as workers,
    ):
        done = {
            tensor.name.removesuffix(".weight"): workers.submit(
                _measure, tensor, files[tensor.source.file], block, dtype, progress
            )
            for tensor in chosen
        }
        try:
            return {module: future.result() for module, future in done.items()}
        finally:
            for future in done.values():
                future.cancel()


def _measure(tensor: PlannedTensor, file: TensorFile, block: int, dtype: str, progress: Progress) -> Sensitivity:
    few, many = (BlockBits(bits, block, SAFETENSORS_NAMES[dtype]) for bits in (4, 8))
    total = Sensitivity()
    for _, _, exact, _ in exact_rows(tensor, file):
        errors = [_square(bits.encode(tensor.name, 0, exact, _nowhere) - exact) for bits in (few, many)]
        total += Sensitivity(exact.numel(), _square(exact), errors[0] - errors[1])
        progress.advance(exact.numel() * tensor.source.nbytes // tensor.source.elements)
    return total


def _nowhere(name: str, offset: int, data: memoryview) -> None:
    """What would be written is not."""


def _square(values: "torch.Tensor") -> float:
    return float(values.square().sum())
