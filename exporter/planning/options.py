"""Every format that a base or an artifact can take, with its needs and the commands that lead there."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from pos2d.exporter.artifact.sidecars import COMPANIONS
from pos2d.exporter.formats.onnx.weight_layout import DATA_FILE
from pos2d.exporter.inputs.checkpoint import Checkpoint, read_config, torch_name
from pos2d.exporter.planning.graph_sizes import graph_sizes
from pos2d.families import Dimensions, expected_tensors
from pos2d.footprint import (
    DTYPE_BYTES,
    HEADER_ENTRY_BYTES,
    Footprint,
    Format,
    Workload,
    card_memory,
    disk_bytes,
    memory,
)
from pos2d.graph_footprint import data_bytes
from pos2d.graph_recipe import BITS
from pos2d.manifest import FILE_NAME, Manifest, read_manifest
from pos2d.recipe import Quant, QuantRecipe

DTYPES = ("float32", "bfloat16", "float16")
GRAPHS = tuple(Format("onnx", "float32", quant) for quant in (None, *BITS))
ADAPTER, RATIO, PROMPT = "YOUR_ADAPTER", "YOUR_RATIO", "YOUR_PROMPT"


@dataclass(frozen=True, slots=True)
class Option:
    """``disk``: bytes of the directory; ``ram``: on the CPU; ``vram``: on a card, of a format that runs there.

    ``commands`` make it, or run it where it is there already.
    """

    name: str
    form: Format
    disk: int
    ram: Footprint
    vram: Footprint | None
    note: str
    commands: tuple[str, ...]

    def fits(self, memory_available: int, gpu_memory: int | None) -> bool:
        """On the card where there is one and the format runs there, else in the memory."""
        if gpu_memory is not None and self.vram is not None:
            return self.vram.peak <= gpu_memory
        return self.ram.peak <= memory_available


@dataclass(frozen=True, slots=True)
class Subject:
    """The model that is planned for and what it is asked to do; ``on_card``: whether the commands are for a card."""

    sizes: Dimensions
    work: Workload
    on_card: bool

    def option(
        self, form: Format, disk: int, commands: Sequence[Sequence[str]], note: str = "", more: int = 0
    ) -> Option:
        """``more``: see :func:`pos2d.footprint.memory`."""
        return Option(
            name=form.name,
            form=form,
            disk=disk,
            ram=memory(self.sizes, form, self.work, more=more),
            vram=None if form.kind == "onnx" else card_memory(self.sizes, form, self.work),
            note=note or ("runs on the CPU only" if form.kind == "onnx" else ""),
            commands=tuple(shlex.join(command) for command in commands),
        )


def options_of_base(base: Checkpoint, model: str, subject: Subject) -> list[Option]:
    """Merges in every type, the base's own among them, then what is exported from them."""
    own = own_dtype(base)
    beside = sum((base.directory / name).stat().st_size for name in COMPANIONS if (base.directory / name).is_file())
    exact = sum(place.nbytes + HEADER_ENTRY_BYTES for place in base.tensors.values())
    # The positions of a training stand in no file, and those that are not its own give a broken model.
    inputs = ["--base-model", model, "--lora", ADAPTER, "--rope-2d-ratio", RATIO]
    merge = ["pos2d", "merge", *inputs]
    options = []
    for dtype in sorted({own, *DTYPES}, key=lambda dtype: (-DTYPE_BYTES[dtype], dtype != own, DTYPES.index(dtype))):
        form = Format("merged", dtype)
        if dtype == own:
            command = [*merge, "-o", "merged"]
            options.append(subject.option(form, exact + beside, [command], "the base's own type"))
        else:
            command = [*merge, "--dtype", dtype, "-o", "merged"]
            options.append(subject.option(form, disk_bytes(base.sizes, form) + beside, [command]))
    return [*options, *exports(inputs, own, beside, subject)]


def options_of_artifact(directory: Path, subject: Subject) -> list[Option]:
    """The artifact itself, in every type that it can compute in, and a merged one's exports."""
    manifest = read_manifest(directory)
    run = ["pos2d", "run", str(directory), "--prompt", PROMPT]
    if manifest.kind == "onnx":
        return [_own_graph(manifest, run, subject)]
    run += ["--device", "cuda" if subject.on_card else "cpu"]
    if manifest.quant is not None:
        # 8 bits on the CPU are computed in bfloat16, whatever the rest is stored in.
        dtype = "bfloat16" if manifest.quant.name == "8bit" and not subject.on_card else manifest.dtype
        form = Format("bnb", dtype, manifest.quant.name)
        return [subject.option(form, manifest.total_bytes, [run], "this artifact")]
    options = [subject.option(Format("merged", manifest.dtype), manifest.total_bytes, [run], "this artifact")]
    for dtype in DTYPES:
        if dtype != manifest.dtype:
            form, command = Format("merged", dtype), [*run, "--dtype", dtype]
            note = f"this artifact, computed in {dtype}"
            options.append(subject.option(form, manifest.total_bytes, [command], note))
    beside = sum(facts["bytes"] for name, facts in manifest.files.items() if name in COMPANIONS)
    return [*options, *exports([str(directory)], manifest.dtype, beside, subject)]


def exports(inputs: Sequence[str], own: str, beside: int, subject: Subject) -> Iterator[Option]:
    """What ``export`` makes of ``inputs``, with weights in ``own``; ``beside``: bytes of tokenizer and settings."""
    for form in (*quantised(own, subject.sizes), *GRAPHS):
        output = form.kind if form.quant is None else f"{form.kind}-{form.quant}"
        command = ["pos2d", "export", *inputs, *export_flags(form, own), "-o", output]
        yield subject.option(form, disk_bytes(subject.sizes, form) + beside, [command])


def _own_graph(manifest: Manifest, run: Sequence[str], subject: Subject) -> Option:
    """An ONNX artifact, whose layers may be quantised otherwise than its format says."""
    form = Format("onnx", manifest.dtype, manifest.graph_quant.name if manifest.graph_quant is not None else None)
    usual = data_bytes(subject.sizes, form.width, form.graph_quant)
    # Half precision runs on a card, where nobody has measured it.
    note = "this artifact; runs on the CPU only" if form.width == 4 else "this artifact; not measured on a card"
    more = manifest.files[DATA_FILE]["bytes"] - usual
    return subject.option(form, manifest.total_bytes, [run], note, more)


def artifact_sizes(directory: Path) -> tuple[Dimensions, str]:
    """The sizes of an artifact, and what it is.

    Raises:
        InputError: see :func:`pos2d.manifest.read_manifest`; a configuration or graph that cannot be read.
    """
    manifest = read_manifest(directory)
    what = f"{manifest.kind} artifact, {manifest.dtype}"
    if manifest.kind == "onnx":
        return graph_sizes(manifest, str(directory / FILE_NAME)), what
    return Dimensions.from_config(read_config(directory), str(directory / "config.json")), what


def own_dtype(base: Checkpoint) -> str:
    """torch's name of the type of the linear weights, which is the type of a merge that keeps the base's."""
    return next(torch_name(place.dtype) for name, place in base.tensors.items() if name.endswith("_proj.weight"))


def export_flags(form: Format, own: str) -> list[str]:
    """Of an export of weights in ``own``."""
    quant = [] if form.quant is None else ["--quant", form.quant]
    if form.kind == "onnx":
        return quant
    return ["--format", form.kind, *quant, *(["--dtype", form.dtype] if form.dtype != own else [])]


def quantised(own: str, sizes: Dimensions) -> list[Format]:
    """The bitsandbytes formats that weights in ``own`` can take: what is not quantised keeps 16 bits or gets them."""
    dtype = own if DTYPE_BYTES[own] == 2 else "bfloat16"
    shapes = {name: shape for name, shape in expected_tensors(sizes).items() if name.endswith("_proj.weight")}
    return [Format("bnb", dtype, quant) for quant in get_args(Quant) if not QuantRecipe(quant).misfits(shapes)]
