"""Refuse a model that the memory cannot hold before anything of it is read."""

from pathlib import Path

from pos2d.footprint import check_memory_fits, least_memory
from pos2d.manifest import Manifest
from runtime.options import LoadOptions

WEIGHT_ENDINGS = (".safetensors", ".onnx.data")


def check_memory(directory: Path, manifest: Manifest, options: LoadOptions) -> None:
    """Hold the weights of an artifact against the memory, where they are sure to go there as they are.

    Only what no run can do without is counted, so that nothing is refused that would run; ``pos2d plan`` counts the
    cache and the rest as well. Quantising while loading, and spreading over devices, are left to the loader.

    Raises:
        StorageError: more bytes than are available.
    """
    on_cpu = options.device == "cpu" or manifest.kind == "onnx"
    if not on_cpu or options.quant is not None:
        return
    import psutil

    stored = sum(facts["bytes"] for name, facts in manifest.files.items() if name.endswith(WEIGHT_ENDINGS))
    computed = manifest.dtype if options.dtype == "auto" else options.dtype
    # What this process holds already, such as torch, is in the need too.
    available = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    check_memory_fits(str(directory), least_memory(manifest.kind, stored, manifest.dtype, computed), available)
