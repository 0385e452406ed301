"""Say what this machine has for the tool, what is missing or too old, and the pip line that adds it.

The requirements are those of the installed package itself, so they are what ``pyproject.toml`` says.
"""

import importlib
import logging
import os
import platform
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pos2d import __version__
from pos2d.errors import InputError
from pos2d.units import size_text

TOOL = "pos2d"
BROKEN, WAITS = "does not import", "waits for"
PURPOSES = {
    "accelerate": "loading quantised models",
    "bitsandbytes": "8 and 4 bits",
    "click": "the command line",
    "huggingface-hub": "bases from the Hub",
    "numpy": "everything",
    "onnx": "ONNX artifacts",
    "onnx-ir": "exporting to ONNX",
    "onnxruntime": "running ONNX artifacts",
    "onnxruntime-gpu": "running ONNX artifacts",
    "packaging": "this report",
    "psutil": "holding needs against the memory",
    "regex": "reading patterns of adapters",
    "rich": "progress and answers on a terminal",
    "safetensors": "weights",
    "torch": "merging, and running merged artifacts",
    "transformers": "tokenizers, and running merged artifacts",
}


@dataclass(frozen=True, slots=True)
class Package:
    """``needed`` is a pip requirement, ``installed`` a version; ``fault`` is why it cannot be used.

    ``extra`` is the group of an optional one; those are not imported here.
    """

    name: str
    needed: str
    installed: str | None
    purpose: str
    extra: str | None
    fault: str | None


@dataclass(frozen=True, slots=True)
class Device:
    """One of torch's: ``about`` is a card's name and compute capability, or the CPU's threads and vector unit."""

    name: str
    about: str
    memory: int | None


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """Sizes in bytes, of this moment; ``disk_free`` of the current directory.

    ``providers`` are those that ONNX Runtime was built with; artifacts of this tool use its CPU one, and float16 graphs
    CUDA's where they are told to. ``repairs`` are the pip commands that make good what the tool needs.
    """

    tool: str
    python: str
    platform: str
    packages: tuple[Package, ...]
    devices: tuple[Device, ...]
    providers: tuple[str, ...]
    memory: int | None
    memory_available: int | None
    disk_free: int
    repairs: tuple[str, ...]

    @property
    def faults(self) -> list[Package]:
        """What the tool needs and cannot use; optional packages are none."""
        return [package for package in self.packages if package.fault and package.extra is None]

    def raise_if_unfit(self) -> None:
        """Raises:
        InputError: something that the tool needs is missing, too old or broken.
        """
        if self.faults:
            named = ", ".join(f"{package.name} ({_brief(package)})" for package in self.faults)
            raise InputError(f"not everything that is needed can be used: {named}; run {' && '.join(self.repairs)}")

    def lines(self) -> list[str]:
        """For people: versions, then devices and room, then what is wrong."""
        rows = [("python", self.python, self.platform), (TOOL, self.tool, "")]
        for package in self.packages:
            group = f", optional: {package.extra}" if package.extra else ""
            state = _brief(package) if package.fault and package.installed else ""
            rows.append((package.name, package.installed or "missing", _joined(package.purpose + group, state)))
        rows += [(device.name, "", _joined(device.about, _size(device.memory))) for device in self.devices]
        rows.append(("onnxruntime", "", f"built with {', '.join(self.providers) or 'nothing'}"))
        if self.memory is not None and self.memory_available is not None:
            rows.append(("memory", "", f"{size_text(self.memory_available)} of {size_text(self.memory)} available"))
        rows.append(("disk", "", f"{size_text(self.disk_free)} free in {Path.cwd()}"))
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        table = [f"{a.ljust(widths[0])}  {b.ljust(widths[1])}  {c}".rstrip() for a, b, c in rows]
        faults = [f"{package.name}: {package.fault}, needed for {package.purpose}" for package in self.faults]
        return [*table, "", *(faults or ["everything that is needed is there"]), *(f"  {r}" for r in self.repairs)]


def doctor() -> DoctorReport:
    """Look at this machine; every package that is needed is imported, optional ones are only looked up.

    Raises:
        InputError: the tool's own package is not installed, so that its requirements are not known.
    """
    packages = _packages()
    usable = {package.name for package in packages if not package.fault}
    memory: Any = importlib.import_module("psutil").virtual_memory() if "psutil" in usable else None
    runtimes = [name for name in usable if name.startswith("onnxruntime")]
    return DoctorReport(
        tool=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        packages=packages,
        devices=_devices() if "torch" in usable else (),
        providers=tuple(importlib.import_module("onnxruntime").get_available_providers()) if runtimes else (),
        memory=memory.total if memory else None,
        memory_available=memory.available if memory else None,
        disk_free=shutil.disk_usage(Path.cwd()).free,
        repairs=_repairs(packages),
    )


def _packages() -> tuple[Package, ...]:
    """What the tool needs, and what its extras do, on this platform."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        raise InputError("the package packaging is missing; run pip install packaging") from None
    try:
        distribution = metadata.distribution(TOOL)
    except metadata.PackageNotFoundError:
        raise InputError(f"{TOOL} is not installed, so what it needs is not known; run pip install -e .") from None
    extras = [None, *sorted(distribution.metadata.get_all("Provides-Extra") or [])]
    found = []
    for line in distribution.requires or []:
        needed = Requirement(line)
        for extra in extras:
            marker = needed.marker
            belongs = extra is None or (marker is not None and not marker.evaluate({"extra": ""}))
            if belongs and (marker is None or marker.evaluate({"extra": extra or ""})):
                found.append(_look_up(needed, extra))
    return tuple(found)


def _look_up(needed: Any, extra: str | None) -> Package:
    """``needed`` is a ``packaging.requirements.Requirement``."""
    try:
        installed: str | None = metadata.version(needed.name)
    except metadata.PackageNotFoundError:
        installed = None
    fault = None
    if installed is None:
        fault = "missing"
    elif not needed.specifier.contains(installed, prereleases=True):
        fault = f"too old or too new: {installed} is not {needed.specifier}"
    elif extra is None:
        fault = _import_fault(needed.name)
    purpose = PURPOSES.get(needed.name, "the tool") if extra is None else f"only for {extra}"
    return Package(needed.name, f"{needed.name}{needed.specifier}", installed, purpose, extra, fault)


def _import_fault(name: str) -> str | None:
    """Why a package cannot be imported, in one line."""
    module = _module(name)
    logging.disable(logging.WARNING)  # bitsandbytes tells of optional kernels while it is imported
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken package raises what it likes, a missing library among it
        other = error.name.split(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else module
        if other != module:
            return f"{WAITS} {other}"
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"{BROKEN}: {reason}"
    finally:
        logging.disable(logging.NOTSET)
    return None


def _module(name: str) -> str:
    return name.removesuffix("-gpu").replace("-", "_")


def _devices() -> tuple[Device, ...]:
    import torch

    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    devices = [Device("cpu", f"{threads}, {torch.backends.cpu.get_cpu_capability()}", None)]
    try:
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            devices.append(
                Device(f"cuda:{number}", f"{card.name}, capability {card.major}.{card.minor}", card.total_memory)
            )
    except RuntimeError as error:  # a driver that does not fit
        devices.append(Device("cuda", f"cannot be used: {str(error).splitlines()[0]}", None))
    if torch.backends.mps.is_available():
        devices.append(Device("mps", "Apple's GPU, in the memory of the machine", None))
    return tuple(devices)


def _repairs(packages: Sequence[Package]) -> tuple[str, ...]:
    """pip lines for what the tool needs: absent or old packages, then those that are there and broken."""
    faulty = {package: str(package.fault) for package in packages if package.fault and package.extra is None}
    broken = [package.needed for package, fault in faulty.items() if fault.startswith(BROKEN)]
    absent = [package.needed for package, fault in faulty.items() if not fault.startswith((BROKEN, WAITS))]
    # What a package waits for may be nothing that the tool asks for itself.
    ours = {_module(package.name) for package in packages}
    others = {fault.removeprefix(f"{WAITS} ") for fault in faulty.values() if fault.startswith(WAITS)} - ours
    lines = (("pip install", [*absent, *sorted(others)]), ("pip install --force-reinstall --no-deps", broken))
    return tuple(f"{start} {shlex.join(those)}" for start, those in lines if those)


def _brief(package: Package) -> str:
    return str(package.fault).split(":")[0]


def _size(count: int | None) -> str:
    return "" if count is None else size_text(count)


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
