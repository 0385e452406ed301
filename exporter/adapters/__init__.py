"""Reads adapters of every form; what is at the path tells which form it is."""

from collections.abc import Sequence
from pathlib import Path

from pos2d.errors import InputError, UsageError
from pos2d.exporter.adapters.adapter import Adapter
from pos2d.exporter.adapters.peft import ADAPTER_CONFIG, read_peft
from pos2d.exporter.adapters.trainer import read_trainer_file
from pos2d.exporter.inputs.checkpoint import Checkpoint

__all__ = ["Adapter", "read_adapters"]


def read_adapters(lora: Sequence[str | Path], base: Checkpoint, lora_rank: int | None = None) -> list[Adapter]:
    """Read every ``PATH`` or ``PATH=WEIGHT`` of ``lora`` and check it against ``base``; no code in the files is run.

    A path is the trainer's ``.pth`` file, a directory that holds one, or a PEFT directory.

    Raises:
        UsageError: no adapter, an adapter given twice, or a weight that is not a finite number other than 0.
        InputError: not an adapter, an incomplete one, or one of another base or of another rank than ``lora_rank``.
        UnsafeInputError: a file that would run code.
    """
    weighted = [split_weight(text) for text in lora]
    paths = [path.resolve() for path, _ in weighted]
    if not weighted or len(set(paths)) < len(paths):
        raise UsageError("give every `lora` once" if weighted else "give at least one `lora`")
    adapters = [_read(path, base, weight) for path, weight in weighted]
    for adapter in adapters:
        if lora_rank is not None and adapter.ranks != [lora_rank]:
            ranks = ", ".join(map(str, adapter.ranks)) or "no rank"
            raise InputError(f"{adapter.path} has rank {ranks}, not {lora_rank}; leave `lora_rank` out or correct it")
    return adapters


def split_weight(text: str | Path) -> tuple[Path, float]:
    """Split ``adapter.pth=0.7`` into path and weight; a path that exists is taken literally.

    Raises:
        UsageError: a weight that is not a finite number other than 0.
    """
    path, mark, number = str(text).rpartition("=")
    if not str(text) or (mark and not path):
        raise UsageError(f"`lora` {text!r} names no adapter")
    if not mark or Path(text).exists():
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = 0.0
    if weight == 0.0 or not abs(weight) < float("inf"):
        raise UsageError(f"`lora` {text}: the weight {number!r} must be a number other than 0, such as 0.7")
    return Path(path), weight


def _read(path: Path, base: Checkpoint, weight: float) -> Adapter:
    if not path.is_dir():
        if not path.is_file():
            raise InputError(f"{path} does not exist; give the trainer's .pth file or a PEFT directory")
        return read_trainer_file(path, base, weight)
    if (path / ADAPTER_CONFIG).is_file():
        return read_peft(path, base, weight)
    if (path / "config.json").is_file():
        raise InputError(f"{path} is a model, not an adapter; give the trainer's .pth file or a PEFT directory")
    files = sorted(path.glob("*.pth"))
    if len(files) != 1:
        raise InputError(f"{path} has {len(files)} .pth files and no {ADAPTER_CONFIG}; give one adapter")
    return read_trainer_file(files[0], base, weight)
