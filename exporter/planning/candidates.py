"""Every format that a plain model or an artifact can be run in, with its footprint and the commands that make it."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from pos2d import hf
from pos2d.bnb_format import BnbQuant
from pos2d.dtypes import ITEM_BYTES
from pos2d.errors import InputError
from pos2d.exporter.planning.footprint import (
    HEADER_ENTRY_BYTES,
    Footprint,
    Format,
    Workload,
    cpu_memory,
    disk_bytes,
    gpu_memory,
)
from pos2d.exporter.planning.graph_footprint import default_layout
from pos2d.exporter.quantisation.held_out import reference_bytes
from pos2d.families import Dimensions, expected_tensors
from pos2d.manifest import GRAPH_KINDS, PROGRAMS, Manifest, read_manifest
from pos2d.onnx_io import DATA_FILE
from pos2d.recipes import BITS, BnbRecipe
from pos2d.sources.checkpoints.checkpoint import Checkpoint, read_config
from pos2d.sources.checkpoints.weight_files import CONFIG
from pos2d.sources.files.tensor_places import torch_name
from pos2d.sources.sidecars.sidecars import CODE, files_in

# Types of merges, the trainer's bfloat16 before float16.
MERGE_DTYPES = ("float32", "bfloat16", "float16")
GRAPH_FORMATS = tuple(Format("onnx", "float32", quant) for quant in (None, *BITS))
# What the user fills in.
PROMPT = "YOUR_PROMPT"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One format of the model: ``disk`` bytes of its directory, ``ram`` on the CPU, ``vram`` on a GPU if it runs there.

    ``commands`` make it, or run it if it exists already.
    """

    name: str
    form: Format
    disk: int
    ram: Footprint
    vram: Footprint | None
    note: str
    commands: tuple[str, ...]

    def fits(self, memory_available: int, gpu_bytes: int | None) -> bool:
        """Whether it fits on the GPU, if there is one and the format runs there, or else in memory."""
        if gpu_bytes is not None and self.vram is not None:
            return self.vram.peak <= gpu_bytes
        return self.ram.peak <= memory_available


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """The model's dimensions, the work that it is planned for, and whether the commands are for a GPU."""

    sizes: Dimensions
    work: Workload
    on_gpu: bool

    def candidate(
        self, form: Format, disk: int, command: Sequence[str], note: str = "", extra_weight_bytes: int = 0
    ) -> Candidate:
        """A format with its footprint; ``extra_weight_bytes``: see :func:`cpu_memory`."""
        on_cpu_only = form.kind == "onnx"
        return Candidate(
            name=form.name,
            form=form,
            disk=disk,
            ram=cpu_memory(self.sizes, form, self.work, extra_weight_bytes=extra_weight_bytes),
            vram=None if on_cpu_only else gpu_memory(self.sizes, form, self.work),
            note=note or ("runs on the CPU only" if on_cpu_only else ""),
            commands=(shlex.join(command),),
        )


def candidates_of_model(base: Checkpoint, model: str, run: PlannedRun) -> list[Candidate]:
    """A plain model as it is, in the other dtypes, and in every other format; ``model`` names it in commands."""
    stored_dtype = linear_dtype(base)
    sidecar_bytes = sum(path.stat().st_size for path in files_in(base.directory).values())
    config_bytes = (base.directory / CONFIG).stat().st_size
    weight_bytes = sum(place.nbytes + HEADER_ENTRY_BYTES for place in base.tensors.values())
    stock = []
    for dtype in sorted({stored_dtype, *MERGE_DTYPES}, key=lambda dtype: _dtype_rank(dtype, stored_dtype)):
        form = Format("stock", dtype)
        if dtype == stored_dtype:
            disk = weight_bytes + sidecar_bytes + config_bytes
            stock.append(run.candidate(form, disk, _run_command(model, run), "this model"))
        else:
            command = ["pos2d", "export", model, *_export_flags(form, base.sizes), "-o", f"stock-{dtype}"]
            stock.append(run.candidate(form, disk_bytes(base.sizes, form) + sidecar_bytes + config_bytes, command))
    return [*stock, *_exports([model], stored_dtype, sidecar_bytes, config_bytes, run)]


def candidates_of_artifact(directory: Path, run: PlannedRun) -> list[Candidate]:
    """The artifact itself, in every dtype that it can compute in; if it is a merge, also all exports."""
    manifest = read_manifest(directory)
    if manifest.kind in GRAPH_KINDS:
        return [_existing_graph(manifest, ["pos2d", "run", str(directory), "--prompt", PROMPT], run)]
    command = _run_command(str(directory), run)
    if isinstance(manifest.quant, BnbRecipe):
        # On the CPU, 8-bit layers are computed in bfloat16, whatever the other weights are stored in.
        dtype = "bfloat16" if manifest.quant.name == "8bit" and not run.on_gpu else manifest.dtype
        form = Format(manifest.kind, dtype, manifest.quant.name)
        return [run.candidate(form, manifest.total_bytes, command, "this artifact")]
    as_stored = run.candidate(Format(manifest.kind, manifest.dtype), manifest.total_bytes, command, "this artifact")
    converted = [
        run.candidate(
            Format(manifest.kind, dtype),
            manifest.total_bytes,
            [*command, "--dtype", dtype],
            f"this artifact, computed in {dtype}",
        )
        for dtype in MERGE_DTYPES
        if dtype != manifest.dtype
    ]
    sidecars = files_in(directory)
    sidecar_bytes = sum(facts["bytes"] for name, facts in manifest.files.items() if name in sidecars)
    settings_bytes = manifest.files[CONFIG]["bytes"] + (_code_bytes() if manifest.rope_2d.is_2d else 0)
    return [as_stored, *converted, *_exports([str(directory)], manifest.dtype, sidecar_bytes, settings_bytes, run)]


def _run_command(model: str, run: PlannedRun) -> list[str]:
    """The command that runs a model on torch."""
    return ["pos2d", "run", model, "--prompt", PROMPT, "--device", "cuda" if run.on_gpu else "cpu"]


def artifact_sizes(directory: Path) -> tuple[Dimensions, str]:
    """The dimensions of an artifact, and its description.

    Raises:
        InputError: see :func:`pos2d.manifest.read_manifest`; a configuration or graph that cannot be read, or a kind
            that only other programs run.
    """
    manifest = read_manifest(directory)
    if manifest.kind in PROGRAMS:
        raise InputError(f"{directory} is of kind {manifest.kind}, which {PROGRAMS[manifest.kind]}")
    description = f"{manifest.kind} artifact, {manifest.dtype}"
    if manifest.graph is not None:
        return manifest.graph.sizes, description
    return Dimensions.from_config(read_config(directory), str(directory / CONFIG)), description


def linear_dtype(base: Checkpoint) -> str:
    """torch's name of the dtype of the linear weights, which is that of a merge without `dtype`."""
    return next(torch_name(place.dtype) for name, place in base.tensors.items() if name.endswith("_proj.weight"))


def _dtype_rank(dtype: str, base_dtype: str) -> tuple[int, bool, int]:
    """Sort key: wide dtypes first, then the base's."""
    return -ITEM_BYTES[dtype], dtype != base_dtype, MERGE_DTYPES.index(dtype)


def _exports(
    inputs: Sequence[str], stored_dtype: str, sidecar_bytes: int, settings_bytes: int, run: PlannedRun
) -> Iterator[Candidate]:
    """What ``export`` can make of ``inputs``; ``sidecar_bytes``: tokenizer and settings, which are copied;
    ``settings_bytes``: configuration and code of a torch artifact."""
    for form in (*_bnb_formats(stored_dtype, run.sizes), *GRAPH_FORMATS):
        output = form.kind if form.quant is None else f"{form.kind}-{form.quant}"
        command = ["pos2d", "export", *inputs, *_export_flags(form, run.sizes), "-o", output]
        disk = disk_bytes(run.sizes, form) + sidecar_bytes
        if form.kind == "bnb":
            disk += settings_bytes
        elif form.quant is not None:
            disk += reference_bytes(run.sizes.vocab, run.sizes.context_length)
        yield run.candidate(form, disk, command)


def _code_bytes() -> int:
    """Bytes of the code in a torch artifact with 2D RoPE."""
    return sum((Path(hf.__file__).parent / name).stat().st_size for name in CODE)


def _existing_graph(manifest: Manifest, command: Sequence[str], run: PlannedRun) -> Candidate:
    """An ONNX artifact; some of its layers may be quantised in another way than its format says."""
    form = Format("onnx", manifest.dtype, manifest.graph_quant.name if manifest.graph_quant is not None else None)
    predicted = default_layout(run.sizes, form.dtype, form.graph_quant).nbytes
    # Half precision runs on a GPU, where it has not been measured.
    note = "this artifact; runs on the CPU only" if form.item_bytes == 4 else "this artifact; not measured on a GPU"
    extra = manifest.files[DATA_FILE]["bytes"] - predicted
    return run.candidate(form, manifest.total_bytes, command, note, extra_weight_bytes=extra)


def _export_flags(form: Format, sizes: Dimensions) -> list[str]:
    quant = [] if form.quant is None else ["--quant", form.quant]
    if form.quant == "auto":
        quant += ["--target-size", str(default_layout(sizes, form.dtype, form.quant).nbytes)]
    if form.kind == "onnx":
        return quant
    if form.kind == "stock":
        return ["--format", form.kind, *quant, "--dtype", form.dtype]
    return ["--format", form.kind, *quant]


def _bnb_formats(stored_dtype: str, sizes: Dimensions) -> list[Format]:
    """The bitsandbytes formats of these layers; weights that are not quantised are stored in 16 bits."""
    dtype = stored_dtype if ITEM_BYTES[stored_dtype] == 2 else "bfloat16"
    shapes = {name: shape for name, shape in expected_tensors(sizes).items() if name.endswith("_proj.weight")}
    return [Format("bnb", dtype, quant) for quant in get_args(BnbQuant) if not BnbRecipe(quant).unsupported(shapes)]
