"""Load an artifact of any kind; its manifest says which kind it is."""

from pathlib import Path
from typing import Any

from pos2d.manifest import read_manifest
from pos2d.options import split_options, takes_options
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.engine.backend import Backend
from pos2d.runtime.model.model import Model


@takes_options(LoadOptions)
def load(path: str | Path, **options: Any) -> Model:
    """Load a merged or bitsandbytes artifact with torch, or an ONNX one with ONNX Runtime.

    Raises:
        InputError: not an artifact, or one whose files are missing or truncated.
        UsageError: a device, type or kernel that this artifact cannot use, or options that contradict each other.
        StorageError: the memory, or the devices together, cannot hold the weights.
    """
    (given,) = split_options(options, LoadOptions)
    load_options = LoadOptions(**given)
    directory = Path(path)
    manifest = read_manifest(directory)
    backend: Backend
    if manifest.kind == "onnx":
        from pos2d.runtime.backends.onnx.backend import OnnxBackend

        backend = OnnxBackend(directory, manifest, load_options)
    else:
        from pos2d.runtime.backends.torch.backend import TorchBackend

        backend = TorchBackend.load(directory, manifest, load_options)
    return Model(directory, manifest, backend)
