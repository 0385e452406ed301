"""Refuse a model that does not fit in memory before any of its weights are read."""

from pathlib import Path

from pos2d.bnb_format import BnbQuant
from pos2d.manifest import Manifest
from pos2d.memory_costs import check_memory_fits, least_memory

WEIGHT_ENDINGS = (".safetensors", ".bin", ".onnx.data")


def check_memory(directory: Path, manifest: Manifest, dtype: str, quant: BnbQuant | None = None) -> None:
    """Check that the weights of an artifact, loaded in ``dtype`` or quantised to ``quant``, fit in the CPU's memory.

    Only what every run needs is counted, so that nothing is refused that would run; ``pos2d plan`` counts the cache and
    the activations as well.

    Raises:
        StorageError: more bytes are needed than are available.
    """
    stored = sum(facts["bytes"] for name, facts in manifest.files.items() if name.endswith(WEIGHT_ENDINGS))
    kind = manifest.kind if manifest.quant is None else "bnb"
    check_least(str(directory), least_memory(kind, stored, manifest.dtype, dtype, quant))


def check_least(model: str, needed: int) -> None:
    """Check that this process can have ``needed`` bytes in all; ``model`` names what needs them in the error.

    Raises:
        StorageError: more bytes are needed than the process holds and can still get.
    """
    import psutil

    # The need includes what this process holds already, such as torch, so that is added to what is available.
    check_memory_fits(model, needed, psutil.virtual_memory().available + psutil.Process().memory_info().rss)
