"""Refuse a model that the memory cannot hold before anything of it is read."""

from pathlib import Path

from pos2d.footprint import check_memory_fits, least_memory
from pos2d.manifest import Manifest
from pos2d.recipe import Quant

WEIGHT_ENDINGS = (".safetensors", ".onnx.data")


def check_memory(directory: Path, manifest: Manifest, dtype: str, quant: Quant | None = None) -> None:
    """Hold the weights of an artifact that goes into the memory, in ``dtype`` or quantised on its way, against it.

    Only what no run can do without is counted, so that nothing is refused that would run; ``pos2d plan`` counts the
    cache and the rest as well.

    Raises:
        StorageError: more bytes than are available.
    """
    stored = sum(facts["bytes"] for name, facts in manifest.files.items() if name.endswith(WEIGHT_ENDINGS))
    check_least(str(directory), least_memory(manifest.kind, stored, manifest.dtype, dtype, quant))


def check_least(what: str, needed: int) -> None:
    """Raises:
    StorageError: the process would need more bytes in all than it has or can get.
    """
    import psutil

    # What this process holds already, such as torch, is in the need too.
    check_memory_fits(what, needed, psutil.virtual_memory().available + psutil.Process().memory_info().rss)
