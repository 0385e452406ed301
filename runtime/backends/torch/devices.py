"""Which device a model runs on, or how its modules are divided among several."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from pos2d.errors import StorageError, UsageError
from pos2d.units import parse_size

# accelerate's device map: module name to device. A module without an entry is where the module around it is.
DeviceMap = dict[str, Any]
# The device of a module, by the module's name.
DeviceOf = Callable[[str], torch.device]


def one_device(name: str) -> torch.device:
    """The torch device called ``name``; ``auto`` is a CUDA GPU, Apple's GPU, or the CPU, in this order.

    Raises:
        UsageError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"`device` {name!r} cannot be used here: {reason}; use `device='cpu'`") from None
    return device


def infer_device_map(model: PreTrainedModel, max_memory: str | None) -> DeviceMap:
    """A device map over all GPUs and the CPU, for an empty model whose parameters have their final types and sizes.

    Raises:
        UsageError: ``max_memory`` cannot be read.
        StorageError: the devices together are too small.
    """
    from accelerate import infer_auto_device_map

    device_map: DeviceMap = infer_auto_device_map(
        model,
        max_memory=None if max_memory is None else parse_max_memory(max_memory),
        no_split_module_classes=model._no_split_modules,
    )
    unplaced = [module for module, device in device_map.items() if device == "disk"]
    if unplaced:
        raise StorageError(
            f"{len(unplaced)} modules, the first of them {unplaced[0]}, fit no device; raise `max_memory`, or use a "
            "smaller `quant`"
        )
    return device_map


def device_lookup(device_map: DeviceMap) -> DeviceOf:
    """A function from a module's name to its device: that of its entry, or of the nearest enclosing module's."""

    def device_of(module: str) -> torch.device:
        while module not in device_map and module:
            module = module.rpartition(".")[0]
        return torch.device(device_map[module])

    return device_of


def parse_max_memory(text: str) -> dict[int | str, int]:
    """Bytes by device, as accelerate takes them, from a text such as ``0=8GB,cpu=16GB``.

    Raises:
        UsageError: ``text`` has another form.
    """
    limits: dict[int | str, int] = {}
    for entry in text.split(","):
        device, _, size = (part.strip() for part in entry.partition("="))
        try:
            if not (device.isdecimal() or device in ("cpu", "mps")):
                raise UsageError
            limits[int(device) if device.isdecimal() else device] = parse_size(size, "max_memory")
        except UsageError:
            raise UsageError(
                f"`max_memory` {text!r}: {entry!r} is not a device (a GPU's number, cpu or mps) and a size, "
                "such as 0=8GB"
            ) from None
    return limits
