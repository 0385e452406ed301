"""Open an artifact of any kind; what it is stands in its manifest."""

from pathlib import Path
from typing import Unpack

from pos2d.manifest import read_manifest
from pos2d.runtime.backends.options import LoadFlags, LoadOptions
from pos2d.runtime.engine.backend import Backend
from pos2d.runtime.model.model import Model


def load(path: str | Path, **flags: Unpack[LoadFlags]) -> Model:
    """A merged or bitsandbytes directory on torch, or an ONNX one on ONNX Runtime.

    ``flags`` are the fields of :class:`pos2d.runtime.backends.options.LoadOptions`.

    Raises:
        InputError: not an artifact, or one whose files are missing or cut.
        UsageError: a device, type or kernel that this artifact cannot use, or flags that contradict each other.
        StorageError: the memory, or the devices together, cannot hold the weights.
    """
    options = LoadOptions(**flags)
    directory = Path(path)
    manifest = read_manifest(directory)
    backend: Backend
    if manifest.kind == "onnx":
        from pos2d.runtime.backends.onnx.backend import OnnxBackend

        backend = OnnxBackend(directory, manifest, options)
    else:
        from pos2d.runtime.backends.torch.backend import TorchBackend

        backend = TorchBackend.load(directory, manifest, options)
    return Model(directory, manifest, backend)
