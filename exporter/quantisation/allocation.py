"""Mixed-precision bit allocation: the layers of a graph that get 8 bits instead of 4 (``quant='auto'``).

Layers are ranked once by how much 8 bits reduce their relative quantisation error for each additional byte, and the
longest prefix of that ranking that fits into the target size gets them.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pos2d.dtypes import SAFETENSORS_NAMES
from pos2d.errors import UsageError
from pos2d.exporter.quantisation.encodings import BlockBits
from pos2d.onnx_io import FUSED_LAYERS
from pos2d.progress import Progress
from pos2d.recipes import GraphRecipe
from pos2d.sources.checkpoints.checkpoint import LM_HEAD
from pos2d.sources.files.parallel import single_threaded_torch, submitted, worker_count
from pos2d.sources.files.tensor_io import TensorFile, opened
from pos2d.sources.source import Source
from pos2d.sources.tensors.exact_rows import exact_rows
from pos2d.sources.tensors.tensor_plan import PlannedTensor, TensorPlan
from pos2d.units import parse_size, size_text

if TYPE_CHECKING:
    import torch

# Layers that read the same input. They get the same bits, so that they stay one product.
FusionGroup = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """How much a layer gains from 8 bits.

    ``weight_square``: the sum of its squared weights; ``error_reduction``: the sum of squared quantisation errors with
    4 bits, less that with 8.
    """

    elements: int = 0
    weight_square: float = 0.0
    error_reduction: float = 0.0

    def __add__(self, other: "LayerSensitivity") -> "LayerSensitivity":
        return LayerSensitivity(
            self.elements + other.elements,
            self.weight_square + other.weight_square,
            self.error_reduction + other.error_reduction,
        )


def allocate_bits(
    source: Source,
    plan: TensorPlan,
    recipe: GraphRecipe,
    dtype: str,
    target_size: str,
    nbytes_of: Callable[[GraphRecipe], int],
) -> GraphRecipe:
    """``recipe`` with 8 bits for as many layers as fit into a file of weights of at most ``target_size``.

    ``nbytes_of`` gives the size of that file for a recipe. Layers with float activations keep 4 bits, since 8 are not
    available to them. The head has 8 bits before any other layer gets them, and 4 only where nothing else fits.

    Raises:
        UsageError: a size that cannot be parsed, or that is too small even for 4 bits.
        InputError: values that are not finite.
    """
    budget = parse_size(target_size, "target_size")
    groups = fusion_groups([m for m, bits in recipe.bits.items() if bits == 4 and m not in recipe.float_activations])

    def size_of(widened: Sequence[FusionGroup], of: GraphRecipe = recipe) -> int:
        return nbytes_of(with_8_bits(of, widened))

    if budget < size_of(()):
        all_4_bits = replace(recipe, bits={**recipe.bits, **({LM_HEAD: 4} if LM_HEAD in recipe.bits else {})})
        least = size_of((), all_4_bits)
        if budget >= least:
            return all_4_bits
        raise UsageError(
            f"`target_size` {target_size} is less than the weights take with 4 bits; give at least {least} bytes "
            f"({size_text(least)}), or another `block_size`"
        )
    if size_of(groups) <= budget:
        return with_8_bits(recipe, groups)
    sensitivities = measure(source, plan, [module for group in groups for module in group], recipe.block_size, dtype)
    return with_8_bits(recipe, longest_prefix(ranked(groups, sensitivities), size_of, budget))


def fusion_groups(modules: Sequence[str]) -> list[FusionGroup]:
    """Group ``modules`` by the input that they read, in their order."""
    groups: dict[str, list[str]] = {}
    for module in modules:
        parent, _, layer = module.rpartition(".")
        fused = layer in FUSED_LAYERS.get(parent.rpartition(".")[2], ())
        groups.setdefault(parent if fused else module, []).append(module)
    return [tuple(group) for group in groups.values()]


def with_8_bits(recipe: GraphRecipe, groups: Sequence[FusionGroup]) -> GraphRecipe:
    """``recipe`` with 8 bits for every layer of ``groups``."""
    return replace(recipe, bits={**recipe.bits, **{module: 8 for group in groups for module in group}})


def ranked(groups: Sequence[FusionGroup], sensitivities: Mapping[str, LayerSensitivity]) -> list[FusionGroup]:
    """The groups by their gain for each additional byte, largest first; ties stay in the model's order."""
    return sorted(groups, key=lambda group: -gain_per_byte([sensitivities[module] for module in group]))


def gain_per_byte(layers: Sequence[LayerSensitivity]) -> float:
    """The reduction of relative squared error, summed over ``layers``, for each byte that 8 bits add to them."""
    # Relative to the weights, not to the change by the adapters: it is as good at small sizes, a quarter less KL at
    # large ones, and chooses the same layers for a merged base. Of layers with equal error, small ones come first, so
    # that attention layers need no rule for themselves (measured, benchmarks/mixed_bits.py).
    gains = (layer.error_reduction / layer.weight_square for layer in layers if layer.weight_square)
    return sum(gains) / (sum(layer.elements for layer in layers) / 2)


def longest_prefix(
    ranking: Sequence[FusionGroup], size_of: Callable[[Sequence[FusionGroup]], int], budget: int
) -> Sequence[FusionGroup]:
    """The longest prefix of ``ranking`` whose size is within ``budget``; the size of an empty one must be.

    No group is skipped for a smaller one that would fit, so that a larger budget never takes 8 bits from a layer.
    """
    return ranking[: bisect_right(range(len(ranking) + 1), budget, key=lambda count: size_of(ranking[:count])) - 1]


def measure(
    source: Source, plan: TensorPlan, modules: Sequence[str], block_size: int, dtype: str
) -> dict[str, LayerSensitivity]:
    """Measure ``modules`` on their exact sums, each of which is read once, some rows at a time.

    Raises:
        InputError: values that are not finite.
    """
    tensors = {tensor.name.removesuffix(".weight"): tensor for tensor in plan.tensors}
    # The largest first, so that the threads end together.
    chosen = sorted((tensors[module] for module in modules), key=lambda tensor: -tensor.source.nbytes)
    with (
        Progress("measuring layers", sum(tensor.source.nbytes for tensor in chosen), unit="bytes") as progress,
        single_threaded_torch(),
        opened(source.base.directory, {tensor.source.file for tensor in chosen}) as files,
        ThreadPoolExecutor(worker_count()) as workers,
    ):
        jobs = ((tensor, files[tensor.source.file], block_size, dtype, progress) for tensor in chosen)
        with submitted(workers, _measure_tensor, jobs) as sensitivities:
            return {t.name.removesuffix(".weight"): one for t, one in zip(chosen, sensitivities, strict=True)}


def _measure_tensor(
    tensor: PlannedTensor, file: TensorFile, block_size: int, dtype: str, progress: Progress
) -> LayerSensitivity:
    encodings = [BlockBits(bits, block_size, SAFETENSORS_NAMES[dtype]) for bits in (4, 8)]
    sensitivity = LayerSensitivity()
    for block in exact_rows(tensor, file):
        exact = block.exact
        errors = [_square(encoding.encode(tensor.name, 0, exact, _discard) - exact) for encoding in encodings]
        sensitivity += LayerSensitivity(exact.numel(), _square(exact), errors[0] - errors[1])
        progress.advance(exact.numel() * tensor.source.nbytes // tensor.source.elements)
    return sensitivity


def _discard(name: str, offset: int, data: memoryview) -> None:
    """A :data:`~pos2d.exporter.quantisation.encodings.Write` that writes nothing."""


def _square(values: "torch.Tensor") -> float:
    return float(values.square().sum())
