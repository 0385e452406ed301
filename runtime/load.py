"""Load a model: an artifact of any kind, whose manifest says which kind it is, or a model that was never merged."""

import warnings
from pathlib import Path
from typing import Any

from pos2d.errors import InputError
from pos2d.manifest import PROGRAMS
from pos2d.options import read_options, takes_options
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.engine.backend import Backend
from pos2d.runtime.model.model import Model
from pos2d.runtime.opening.opened_model import OpenedModel, open_model
from pos2d.sources.base_options import BaseOptions
from pos2d.sources.positions import TrainedPositions


@takes_options(BaseOptions, TrainedPositions, LoadOptions)
def load(path: str | Path | None = None, **options: Any) -> Model:
    """Load an artifact, a plain model, or ``base_model`` with the adapters of ``lora``, which are added in memory.

    ONNX and genai artifacts run on ONNX Runtime, and everything else on torch. A plain model is a Hugging Face
    directory, or the id of one on the Hub as ``ORG/NAME@REVISION``.

    Raises:
        InputError: neither an artifact nor a model, files that are missing or truncated, or see :func:`pos2d.merge`.
        UsageError: a device, type or kernel that this model cannot use, or options that contradict each other.
        UnsafeInputError: weights that would run code.
        StorageError: the memory, or the devices together, cannot hold the weights.
    """
    loading, base, positions = read_options(options, LoadOptions, BaseOptions, TrainedPositions)
    opened = open_model(path, base, positions)
    for warning in opened.warnings:
        warnings.warn(warning, stacklevel=3)
    return load_opened(opened, loading)


def load_opened(opened: OpenedModel, options: LoadOptions) -> Model:
    """Load a model that is opened; see :func:`load`."""
    program = PROGRAMS.get(opened.manifest.kind)
    if program is not None:
        raise InputError(f"{opened.directory} is of kind {opened.manifest.kind}, which {program}")
    backend: Backend
    if opened.manifest.kind == "onnx":
        from pos2d.runtime.backends.onnx.backend import OnnxBackend

        backend = OnnxBackend(opened.directory, opened.manifest, options)
    elif opened.manifest.kind == "genai":
        from pos2d.runtime.backends.onnx.genai import GenAIBackend

        backend = GenAIBackend(opened.directory, opened.manifest, options)
    else:
        from pos2d.runtime.backends.torch.backend import TorchBackend

        backend = TorchBackend.load(opened, options)
    stamp = None
    if opened.source is not None:
        from pos2d.runtime.opening.identity import weights_stamp

        stamp = weights_stamp(opened.source)
    return Model(opened.directory, opened.manifest, backend, opened.temporary, stamp)
