"""A bitsandbytes checkpoint, written from the exact sum of base and adapters, shard by shard and without a GPU."""

import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pos2d.errors import UsageError
from pos2d.exporter.artifact.hf_config import baked_config
from pos2d.exporter.artifact.sidecars import copy_code
from pos2d.exporter.artifact.staging import write_json
from pos2d.exporter.files.parallel import single_threaded_torch, worker_count
from pos2d.exporter.files.tensor_io import TensorFile, opened, write_at
from pos2d.exporter.formats.wanted import Wanted
from pos2d.exporter.inputs.checkpoint import INDEX, LM_HEAD, TensorPlace
from pos2d.exporter.merging.ledger import Tally
from pos2d.exporter.quantisation.encodings import Encoding, Int8Rows, Nf4Blocks, Rounded
from pos2d.exporter.quantisation.module_names import named_modules
from pos2d.exporter.quantisation.totals import QuantTotals, totals_of
from pos2d.exporter.quantisation.writing import write_tensor
from pos2d.exporter.sources.source import Source
from pos2d.exporter.tensors.plan import PlannedTensor, index_of, lay_out, plan_merge, split
from pos2d.progress import Progress
from pos2d.recipe import OUTLIER_THRESHOLD, Quant, QuantRecipe

DEFAULT_SHARD_SIZE = "5GB"
SKIPPED = LM_HEAD


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """One weight, how it is written, and where every tensor that is written for it lies."""

    tensor: PlannedTensor
    encoding: Encoding
    places: Mapping[str, TensorPlace]


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    file: str
    header: bytes
    outputs: tuple[Output, ...]


@dataclass(frozen=True, slots=True, eq=False)
class QuantPlan:
    """All shards; ``dtype`` is torch's name of the type of what is not quantised."""

    shards: tuple[Shard, ...]
    recipe: QuantRecipe
    dtype: str
    tied: bool

    @property
    def places(self) -> dict[str, TensorPlace]:
        """Where every written tensor lies, by its name."""
        outputs = (output for shard in self.shards for output in shard.outputs)
        return {name: place for output in outputs for name, place in output.places.items()}

    @property
    def nbytes(self) -> int:
        return sum(len(shard.header) for shard in self.shards) + sum(place.nbytes for place in self.places.values())


def plan_bnb(source: Source, wanted: Wanted) -> QuantPlan:
    """Lay out the result. A tied head that is not among the skipped modules gets its own tensor.

    Raises:
        UsageError: a module that is not there, none that is left, or a size that cannot be read.
        InputError: a layer that cannot be quantised so.
    """
    quant: Quant = "8bit" if wanted.quant == "8bit" else "nf4"
    skip_modules = SKIPPED if wanted.skip_modules is None else wanted.skip_modules
    skipped = named_modules(skip_modules, list(source.base.linear_shapes()), "--skip-modules")
    plan = plan_merge(source.base, source.adapters, wanted.dtype, untied=LM_HEAD not in skipped)
    recipe = QuantRecipe(quant, skipped)
    modules = {name: shape for name, shape in source.base.linear_shapes().items() if name not in skipped}
    if not modules:
        raise UsageError(f"--skip-modules {skip_modules} leaves nothing to quantise")
    recipe.check(modules)
    encodings = {t.name: _encoding(t, recipe, plan.dtype, modules) for t in plan.tensors}
    written = {t.name: encodings[t.name].outputs(t.name, t.target.shape) for t in plan.tensors}
    sizes = {
        name: sum(TensorPlace("", shape, kind).nbytes for kind, shape in outputs.values())
        for name, outputs in written.items()
    }
    files = split(sizes, wanted.max_shard_size or DEFAULT_SHARD_SIZE)
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    shards = tuple(_shard(file, [tensors[name] for name in names], encodings, written) for file, names in files.items())
    return QuantPlan(shards, recipe, plan.dtype, plan.tied)


def write_bnb(source: Source, plan: QuantPlan, target: Path) -> QuantTotals:
    """Write weights, index, configuration and code into ``target``.

    Raises:
        InputError: values that are not finite, or a base that changed while it was read.
    """
    tallies: list[Tally] = []
    with Progress("quantising", plan.nbytes, unit="bytes") as progress, single_threaded_torch():
        for shard in plan.shards:
            tallies += _write_shard(shard, source.base.directory, target, progress)
    if len(plan.shards) > 1:
        write_json(target / INDEX, index_of(plan.places))
    config = baked_config(source.base, source.spec, plan.dtype, plan.tied)
    write_json(target / "config.json", config | {"quantization_config": _loading(plan.recipe, plan.dtype)})
    copy_code(target)
    return totals_of(tallies, sum(len(shard.outputs) for shard in plan.shards))


def _encoding(tensor: PlannedTensor, recipe: QuantRecipe, dtype: str, modules: Collection[str]) -> Encoding:
    if tensor.name.removesuffix(".weight") not in modules:
        return Rounded(tensor.target.dtype)
    return Int8Rows() if recipe.name == "8bit" else Nf4Blocks(dtype)


def _shard(
    file: str,
    tensors: Sequence[PlannedTensor],
    encodings: Mapping[str, Encoding],
    written: Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]],
) -> Shard:
    header, places = lay_out(file, {output: kind for t in tensors for output, kind in written[t.name].items()})
    outputs = (Output(t, encodings[t.name], {output: places[output] for output in written[t.name]}) for t in tensors)
    return Shard(file, header, tuple(outputs))


def _write_shard(shard: Shard, base: Path, target: Path, progress: Progress) -> list[Tally]:
    """Sums over every quantised tensor of a shard."""
    descriptor = os.open(target / shard.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_at(descriptor, memoryview(shard.header), 0)
        progress.advance(len(shard.header))
        with (
            opened(base, {output.tensor.source.file for output in shard.outputs}) as files,
            ThreadPoolExecutor(worker_count()) as workers,
        ):
            # The largest first: the threads then end together.
            order = sorted(shard.outputs, key=lambda output: -output.tensor.source.nbytes)
            done = [
                workers.submit(_write_output, output, files[output.tensor.source.file], descriptor, progress)
                for output in order
            ]
            try:
                return [tally for tally in (future.result() for future in done) if tally is not None]
            finally:
                for future in done:
                    future.cancel()
    finally:
        os.close(descriptor)


def _write_output(output: Output, file: TensorFile, descriptor: int, progress: Progress) -> Tally | None:
    def write(name: str, offset: int, data: memoryview) -> None:
        write_at(descriptor, data, output.places[name].offset + offset)
        progress.advance(len(data))

    tensor = output.tensor
    tally = write_tensor(tensor, file, output.encoding, write)
    output.encoding.finish(tensor.name, tensor.target.shape, write)
    return tally


def _loading(recipe: QuantRecipe, dtype: str) -> dict[str, Any]:
    """What transformers reads of it, in the form of both generations."""
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
