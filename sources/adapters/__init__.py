"""Reads adapters of every form; what is at the path tells which form it is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pos2d.errors import InputError, UsageError
from pos2d.sources.adapters.adapter import Adapter
from pos2d.sources.adapters.location import Location, locate
from pos2d.sources.adapters.mlx import read_mlx
from pos2d.sources.adapters.peft import read_peft
from pos2d.sources.adapters.sums import check_sum
from pos2d.sources.adapters.trainer import read_trainer_file
from pos2d.sources.adapters.vocabulary import resized
from pos2d.sources.checkpoints.checkpoint import Checkpoint

__all__ = ["Adapter", "read_adapters"]

READERS: Mapping[str, Callable[[Path, Checkpoint, float], Adapter]] = {
    "trainer": read_trainer_file,
    "peft": read_peft,
    "mlx": read_mlx,
}


def read_adapters(
    lora: Sequence[str | Path], base: Checkpoint, lora_rank: int | None = None, then: Sequence[str | Path] = ()
) -> list[Adapter]:
    """Read every ``PATH`` or ``PATH=WEIGHT`` and check it against ``base``; no code in the files is run.

    A path is the trainer's ``.pth`` file, a directory that holds one, a directory of PEFT or MLX, or the id of an
    adapter on the Hub. The adapters of ``lora`` are summed, each as trained on ``base``. Each of ``then`` is one step
    more, trained on the result of all before it.

    Raises:
        UsageError: no adapter, an adapter given twice, or a weight that is not a finite number other than 0.
        InputError: not an adapter, an incomplete one, one of another base or of another rank than ``lora_rank``, or
            adapters whose sum nobody trained.
        UnsafeInputError: a file that would run code.
    """
    steps = [[split_weight(text) for text in lora], *([split_weight(text)] for text in then)]
    if not steps[0]:
        raise UsageError("give at least one `lora`")
    given = [path.resolve() for step in steps for path, _ in step]
    if len(set(given)) < len(given):
        raise UsageError("give every adapter once, in `lora` or in `then`")
    found = [[(locate(path), weight) for path, weight in step] for step in steps]
    adapters: list[Adapter] = []
    for number, step in enumerate(found):
        added = [_read(location, base, weight).at_step(number) for location, weight in step]
        check_sum(added, base)
        base = next((resized(base, adapter.vocab) for adapter in added if adapter.vocab is not None), base)
        adapters += added
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


def _read(location: Location, base: Checkpoint, weight: float) -> Adapter:
    return replace(READERS[location.form](location.path, base, weight), label=location.label)
