"""Open an artifact of any kind; what it is stands in its manifest."""

from pathlib import Path

from pos2d.manifest import read_manifest
from runtime.backend import Backend
from runtime.model import Model


def load(path: str | Path, device: str = "cpu", dtype: str = "auto") -> Model:
    """A merged directory on torch, or an ONNX one on ONNX Runtime.

    ``device`` is torch's name of a device (ONNX artifacts: ``cpu``); ``dtype`` ``auto`` keeps the stored type.

    Raises:
        InputError: not an artifact, or one whose files are missing or cut.
        UsageError: a device or type that this artifact cannot use.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    backend: Backend
    if manifest.kind == "onnx":
        from runtime.onnx_backend import OnnxBackend

        backend = OnnxBackend(directory, manifest, device, dtype)
    else:
        from runtime.torch_backend import TorchBackend

        backend = TorchBackend(directory, manifest, device, dtype)
    return Model(directory, manifest, backend)
