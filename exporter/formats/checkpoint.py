"""The weights of a torch checkpoint, in floating point or in a format of bitsandbytes.

They are written from the exact sum of base and adapters, shard by shard and without a GPU.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from pos2d.bnb_format import OUTLIER_THRESHOLD, BnbQuant
from pos2d.dtypes import ITEM_BYTES
from pos2d.errors import UsageError
from pos2d.exporter.formats.options import ExportOptions
from pos2d.exporter.quantisation.encodings import Encoding, Int8Rows, Nf4Blocks, Rounded
from pos2d.exporter.quantisation.module_names import named_modules
from pos2d.exporter.quantisation.summary import rounding_totals, summarise
from pos2d.exporter.quantisation.writing import write_tensor
from pos2d.progress import Progress
from pos2d.recipes import BnbRecipe
from pos2d.sources.checkpoints.checkpoint import LM_HEAD
from pos2d.sources.checkpoints.weight_files import CONFIG, INDEX
from pos2d.sources.files.json_object import write_json
from pos2d.sources.files.parallel import single_threaded_torch, submitted, worker_count
from pos2d.sources.files.safetensors_layout import index_of, lay_out, split
from pos2d.sources.files.tensor_io import TensorFile, opened, write_at
from pos2d.sources.files.tensor_places import TensorPlace
from pos2d.sources.source import Source
from pos2d.sources.tensors.stats import DeltaStats
from pos2d.sources.tensors.tensor_plan import PlannedTensor, plan_tensors

DEFAULT_SHARD_SIZE = "5GB"
DEFAULT_SKIPPED = LM_HEAD
# What the other weights of a float32 base become: the kernels of bitsandbytes cast wider activations in every layer.
WIDE_DTYPE = "bfloat16"


@dataclass(frozen=True, slots=True, eq=False)
class EncodedTensor:
    """One weight, its encoding, and by name the place of every tensor that the encoding stores for it."""

    tensor: PlannedTensor
    encoding: Encoding
    places: Mapping[str, TensorPlace]


@dataclass(frozen=True, slots=True, eq=False)
class EncodedShard:
    """One safetensors file: its header, and its weights."""

    file: str
    header: bytes
    weights: tuple[EncodedTensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointPlan:
    """All shards. ``recipe``: how layers are quantised, or None; ``dtype``: torch's name of the type of all others."""

    shards: tuple[EncodedShard, ...]
    recipe: BnbRecipe | None
    dtype: str
    tied: bool
    warnings: tuple[str, ...] = ()

    @property
    def places(self) -> dict[str, TensorPlace]:
        """The place of every stored tensor, by name."""
        weights = (weight for shard in self.shards for weight in shard.weights)
        return {name: place for weight in weights for name, place in weight.places.items()}

    @property
    def keeps_values(self) -> bool:
        """Whether no weight of the base is rounded to a narrower type, or quantised."""
        tensors = [weight.tensor for shard in self.shards for weight in shard.weights]
        return self.recipe is None and all(tensor.dtype in (tensor.source.dtype, "F32") for tensor in tensors)

    @property
    def nbytes(self) -> int:
        return sum(len(shard.header) for shard in self.shards) + sum(place.nbytes for place in self.places.values())


def plan_checkpoint(source: Source, options: ExportOptions) -> CheckpointPlan:
    """Lay out the shards. A tied head that is quantised becomes a separate tensor.

    Raises:
        UsageError: skipped modules that do not exist or leave nothing to quantise, or a size that cannot be read.
        InputError: a layer whose shape bitsandbytes cannot quantise.
    """
    recipe, quantised = (None, set[str]()) if options.quant == "none" else _recipe(source, options)
    untied = recipe is not None and LM_HEAD not in recipe.skip_modules
    merged = plan_tensors(source.base, source.adapters, options.dtype, untied=untied)
    if recipe is not None and options.dtype == "auto" and ITEM_BYTES[merged.dtype] > ITEM_BYTES[WIDE_DTYPE]:
        merged = plan_tensors(source.base, source.adapters, WIDE_DTYPE, untied=untied)
    encodings = {tensor.name: _encoding(tensor, recipe, merged.dtype, quantised) for tensor in merged.tensors}
    stored = {tensor.name: encodings[tensor.name].outputs(tensor.name, tensor.shape) for tensor in merged.tensors}
    nbytes = {
        name: sum(TensorPlace("", shape, kind).nbytes for kind, shape in outputs.values())
        for name, outputs in stored.items()
    }
    files = split(nbytes, options.max_shard_size or DEFAULT_SHARD_SIZE)
    tensors = {tensor.name: tensor for tensor in merged.tensors}
    shards = (_shard(file, [tensors[name] for name in names], encodings, stored) for file, names in files.items())
    return CheckpointPlan(tuple(shards), recipe, merged.dtype, merged.tied)


def write_checkpoint(source: Source, plan: CheckpointPlan, config: Mapping[str, Any], target: Path) -> dict[str, Any]:
    """Write weights, index and ``config`` into ``target``; returns the manifest's fields for them.

    Raises:
        InputError: values that are not finite, or a base that changed while it was read.
    """
    tallies: list[DeltaStats] = []
    is_float = plan.recipe is None
    label = "writing" if is_float else "quantising"
    with Progress(label, plan.nbytes, unit="bytes") as progress, single_threaded_torch():
        for shard in plan.shards:
            tallies += _write_shard(shard, source.base.directory, target, progress, measure_rounded=is_float)
    if len(plan.shards) > 1:
        write_json(target / INDEX, index_of(plan.places))
    quantised = {} if plan.recipe is None else {"quantization_config": _quantization_config(plan.recipe, plan.dtype)}
    write_json(target / CONFIG, {**config, **quantised})
    count = sum(len(shard.weights) for shard in plan.shards)
    if is_float:
        # What a further rounding of a merge leaves of its adapters is not known.
        known = {"retention": source.retention} if plan.keeps_values else {}
        totals = rounding_totals(tallies, count) if tallies else {"tensors": count, **known}
    else:
        totals = asdict(summarise(tallies, count))
    return {"dtype": plan.dtype, "quant": plan.recipe, "ledger": {"totals": totals}}


def _recipe(source: Source, options: ExportOptions) -> tuple[BnbRecipe, set[str]]:
    """How layers of ``source`` are quantised, and which."""
    skip_modules = DEFAULT_SKIPPED if options.skip_modules is None else options.skip_modules
    shapes = source.base.linear_shapes()
    recipe = BnbRecipe(cast(BnbQuant, options.quant), named_modules(skip_modules, list(shapes), "`skip_modules`"))
    quantised = {module: shape for module, shape in shapes.items() if module not in recipe.skip_modules}
    if not quantised:
        raise UsageError(f"`skip_modules={skip_modules!r}` leaves nothing to quantise")
    recipe.check(quantised)
    return recipe, set(quantised)


def _encoding(tensor: PlannedTensor, recipe: BnbRecipe | None, dtype: str, quantised: Collection[str]) -> Encoding:
    if recipe is None or tensor.name.removesuffix(".weight") not in quantised:
        return Rounded(tensor.dtype)
    return Int8Rows() if recipe.name == "8bit" else Nf4Blocks(dtype)


def _shard(
    file: str,
    tensors: Sequence[PlannedTensor],
    encodings: Mapping[str, Encoding],
    stored: Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]],
) -> EncodedShard:
    header, places = lay_out(file, {name: kind for t in tensors for name, kind in stored[t.name].items()})
    weights = (EncodedTensor(t, encodings[t.name], {name: places[name] for name in stored[t.name]}) for t in tensors)
    return EncodedShard(file, header, tuple(weights))


def _write_shard(
    shard: EncodedShard, base: Path, target: Path, progress: Progress, measure_rounded: bool
) -> list[DeltaStats]:
    """Write one file; returns the sums over each quantised tensor, or over each rounded one that adapters change."""
    descriptor = os.open(target / shard.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_at(descriptor, memoryview(shard.header), 0)
        progress.advance(len(shard.header))
        with (
            opened(base, {weight.tensor.source.file for weight in shard.weights}) as files,
            ThreadPoolExecutor(worker_count()) as workers,
        ):
            # The largest first, so that all threads end at about the same time.
            order = sorted(shard.weights, key=lambda weight: -weight.tensor.source.nbytes)
            jobs = (
                (weight, files[weight.tensor.source.file], descriptor, progress, measure_rounded) for weight in order
            )
            with submitted(workers, _write_weight, jobs) as tallies:
                return [tally for tally in tallies if tally is not None]
    finally:
        os.close(descriptor)


def _write_weight(
    weight: EncodedTensor, file: TensorFile, descriptor: int, progress: Progress, measure_rounded: bool
) -> DeltaStats | None:
    def write_stored(name: str, offset: int, data: memoryview) -> None:
        write_at(descriptor, data, weight.places[name].offset + offset)
        progress.advance(len(data))

    tensor = weight.tensor
    measure = bool(tensor.deltas) if measure_rounded else None
    tally = write_tensor(tensor, file, weight.encoding, write_stored, measure=measure)
    weight.encoding.finish(tensor.name, tensor.shape, write_stored)
    return tally


def _quantization_config(recipe: BnbRecipe, dtype: str) -> dict[str, Any]:
    """What transformers reads from ``config.json``, with the keys that its versions 4 and 5 need."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": recipe.name == "8bit",
        "load_in_4bit": recipe.name == "nf4",
        "llm_int8_threshold": OUTLIER_THRESHOLD,
        "llm_int8_skip_modules": list(recipe.skip_modules),
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_use_double_quant": False,
    }
