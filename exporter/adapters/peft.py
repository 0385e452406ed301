"""PEFT directories: known by their configuration, and refused so far."""

from pathlib import Path

from exporter.adapters.adapter import Adapter
from exporter.checkpoint import Checkpoint
from pos2d.errors import InputError

ADAPTER_CONFIG = "adapter_config.json"


def read_peft(path: Path, base: Checkpoint, weight: float = 1.0) -> Adapter:
    """Raises:
    InputError: always.
    """
    raise InputError(f"{path} is a PEFT directory, which is not supported; give one .pth file of the trainer")
