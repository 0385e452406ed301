"""Turn a merged directory into another format: so far an ONNX graph that takes ``pos2d``."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.checkpoint import Checkpoint, read_checkpoint, read_config
from exporter.companions import copy_companions
from exporter.staging import check_output, file_facts, staged
from pos2d.errors import InputError, ParityError, Pos2DError, UsageError
from pos2d.families import CLASS_NAMES
from pos2d.manifest import Manifest, read_manifest
from pos2d.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

FORMATS = ("onnx",)
GRAPH_FILE, DATA_FILE = "model.onnx", "model.onnx.data"


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote; ``parity`` holds the figures of the closing check, or nothing where it was skipped."""

    output: str
    format: str
    nodes: int
    bytes: int
    seconds: float
    parity: Mapping[str, Any] | None


def export(
    merged: str | Path, output: str | Path, *, format: str = "onnx", no_verify: bool = False, force: bool = False
) -> ExportReport:
    """Write ``output``, a float32 ONNX decoder with its KV cache, from a directory that :func:`exporter.merge` wrote.

    The result is held against ``merged`` by the ``verify`` command, in a process of its own and from the written files
    alone, before it takes its place; ``no_verify`` skips that. ``force`` replaces an artifact that is there.

    Raises:
        UsageError: a format that does not exist.
        InputError: ``merged`` is not a merged directory, or its weights do not fit its configuration.
        ParityError: the written graph does not agree with ``merged``; nothing is kept.
        OutputError, StorageError: see :func:`exporter.staging.staged`.
    """
    started = time.monotonic()
    merged, output = Path(merged), Path(output)
    if format not in FORMATS:
        raise UsageError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    check_output(output, force=force)
    source = read_manifest(merged)
    if source.kind != "merged":
        raise InputError(f"{merged} is of kind {source.kind}; export starts from a merged directory")
    checkpoint = read_checkpoint(merged, read_config(merged))

    with staged(output, force=force) as staging:
        model = _build(checkpoint, source)
        _save(model, staging)
        copy_companions(merged, staging)
        manifest = replace(
            source,
            kind="onnx",
            dtype="float32",
            ledger=None,
            graph=_describe(model),
            files=file_facts(staging),
            parity=None,
        )
        manifest.write(staging)
        parity = None if no_verify else _verify(staging, merged)
        replace(manifest, parity=parity).write(staging)
    return ExportReport(
        output=str(output),
        format=format,
        nodes=len(model.graph),
        bytes=manifest.total_bytes,
        seconds=time.monotonic() - started,
        parity=parity,
    )


def _build(checkpoint: Checkpoint, manifest: Manifest) -> "ir.Model":
    from exporter.graph import build_decoder

    inv_freq, scaling = _frequencies(checkpoint)
    return build_decoder(
        checkpoint.sizes, manifest.rope_2d, inv_freq, scaling, lambda name: _lazy_tensor(checkpoint, name)
    )


def _frequencies(checkpoint: Checkpoint) -> "tuple[np.ndarray, float]":
    """Inverse frequencies ``[F]`` and attention scaling, as the torch model computes them."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from pos2d.hf import configuration_pos2d

    config = getattr(configuration_pos2d, f"{CLASS_NAMES[checkpoint.sizes.family]}Config").from_pretrained(
        checkpoint.directory
    )
    rotary = LlamaRotaryEmbedding(config)  # the other families' class is the same code
    return rotary.inv_freq.numpy(), float(rotary.attention_scaling)


def _lazy_tensor(checkpoint: Checkpoint, name: str) -> "ir.LazyTensor":
    """A tensor that is read when the graph is written, and forgotten after."""
    import onnx_ir as ir
    from safetensors import safe_open

    place = checkpoint.tensors[name]

    def read() -> "ir.TensorProtocol":
        with safe_open(checkpoint.directory / place.file, framework="pt") as reader:
            return ir.tensor(reader.get_tensor(name).float().numpy(), name=name)

    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(place.shape), name=name)


def _save(model: "ir.Model", staging: Path) -> None:
    import onnx_ir as ir

    weights = sum(1 for value in model.graph.initializers.values() if isinstance(value.const_value, ir.LazyTensor))
    with Progress("writing weights", weights) as progress:
        ir.save(
            model,
            staging / GRAPH_FILE,
            external_data=DATA_FILE,
            size_threshold_bytes=1024,
            alignment=4096,
            callback=lambda _tensor, _info: progress.advance(),
        )


def _describe(model: "ir.Model") -> dict[str, Any]:
    """File names, opsets, and every input and output with its type and shape (named dimensions as strings)."""

    def describe(value: "ir.Value") -> dict[str, Any]:
        dims = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ()]
        dtype = value.dtype.numpy().name if value.dtype is not None else "unknown"
        return {"name": value.name, "dtype": dtype, "shape": dims}

    return {
        "file": GRAPH_FILE,
        "data": DATA_FILE,
        "opsets": dict(model.opset_imports),
        "inputs": [describe(value) for value in model.graph.inputs],
        "outputs": [describe(value) for value in model.graph.outputs],
    }


def _verify(staging: Path, merged: Path) -> dict[str, Any]:
    """Run ``verify`` on the written files; exporter and runtime meet nowhere else than in the artifact."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "cli", "verify", str(staging), "--against", str(merged), "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with Progress("verifying", 1):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == ParityError.exit_code:
        raise ParityError(
            f"the exported graph does not agree with {merged}; nothing was kept. {_last_line(done.stderr)}"
        )
    if done.returncode != 0:
        raise Pos2DError(f"verify ended with exit code {done.returncode}: {_last_line(done.stderr)}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1].removeprefix("error: ") if text.strip() else "it said nothing"
