"""Where a model goes: one device, or all of them."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from pos2d.errors import StorageError, UsageError

Place = Callable[[str], torch.device]
# Module name to device, as accelerate names it; what a module has not, those inside it may.
Homes = dict[str, Any]


def one_device(name: str) -> torch.device:
    """torch's device of that name; ``auto`` is a CUDA card, Apple's GPU, or the CPU.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used here: {reason}; use --device cpu") from None
    return device


def spread(model: PreTrainedModel, max_memory: str | None) -> Homes:
    """For an empty ``model`` whose parameters have their final types and sizes.

    Raises:
        UsageError: ``max_memory`` cannot be read.
        StorageError: the devices together are too small.
    """
    from accelerate import infer_auto_device_map

    found: Homes = infer_auto_device_map(
        model, max_memory=parse_max_memory(max_memory), no_split_module_classes=model._no_split_modules
    )
    homeless = [module for module, device in found.items() if device == "disk"]
    if homeless:
        raise StorageError(
            f"{len(homeless)} parts of the model, {homeless[0]} the first, fit no device; raise --max-memory, or use a "
            "smaller --quant"
        )
    return found


def place_of(homes: Homes) -> Place:
    """The device of a module: its own, or that of the nearest module around it that has one."""

    def place(module: str) -> torch.device:
        while module not in homes and module:
            module = module.rpartition(".")[0]
        return torch.device(homes[module])

    return place


def parse_max_memory(text: str | None) -> dict[int | str, str] | None:
    """``0=8GB,cpu=16GB`` as accelerate takes it.

    Raises:
        UsageError: something else.
    """
    if text is None:
        return None
    from accelerate.utils import convert_file_size_to_int

    found: dict[int | str, str] = {}
    for part in text.split(","):
        device, mark, size = (piece.strip() for piece in part.partition("="))
        try:
            convert_file_size_to_int(size)
        except ValueError:
            mark = ""
        if not mark or not (device.isdecimal() or device in ("cpu", "mps")):
            raise UsageError(f"--max-memory {text!r}: {part!r} is not a card's number or cpu and a size, such as 0=8GB")
        found[int(device) if device.isdecimal() else device] = size
    return found
