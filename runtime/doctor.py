"""Report what this machine has for the tool, what is missing or too old, and the pip command that installs it.

The requirements are those of the installed package, so they are those of ``pyproject.toml``.
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
from pos2d.options import takes_options
from pos2d.threads import VARIABLE, cpu_quota, default_threads, usable_cores

TOOL = "pos2d"
# How the faults of packages begin: the package fails to import, or only because another package is missing.
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
    "psutil": "checking that models fit in memory",
    "regex": "module patterns in PEFT adapters",
    "rich": "progress and answers on a terminal",
    "safetensors": "weights",
    "torch": "merging, and running merged artifacts",
    "transformers": "tokenizers, and running merged artifacts",
}


@dataclass(frozen=True, slots=True)
class Package:
    """One required or optional package.

    ``needed`` is a pip requirement, ``installed`` a version, and ``fault`` why the package cannot be used. ``extra`` is
    the extra that an optional package belongs to; optional packages are not imported here.
    """

    name: str
    needed: str
    installed: str | None
    purpose: str
    extra: str | None
    fault: str | None

    @property
    def short_fault(self) -> str:
        """The kind of fault, without details."""
        return str(self.fault).split(":")[0]


@dataclass(frozen=True, slots=True)
class Device:
    """One torch device: ``about`` is a GPU's name and compute capability, or the CPU's cores and vector unit.

    ``memory`` is in bytes, and absent for devices that use the machine's.
    """

    name: str
    about: str
    memory: int | None


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """What this machine has now. Sizes are in bytes; ``disk_free`` is for the current directory.

    ``providers`` are those that ONNX Runtime was built with. Artifacts use its CPU provider; float16 graphs can use
    CUDA's. ``repairs`` are the pip commands that install or repair what the tool needs.
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
        """The required packages that cannot be used."""
        return [package for package in self.packages if package.fault and package.extra is None]

    def raise_if_unfit(self) -> None:
        """Refuse a machine that cannot run the tool.

        Raises:
            InputError: a required package is missing, too old or broken.
        """
        if self.faults:
            named = ", ".join(f"{package.name} ({package.short_fault})" for package in self.faults)
            raise InputError(f"required packages cannot be used: {named}; run {' && '.join(self.repairs)}")


@takes_options()
def doctor() -> DoctorReport:
    """Inspect this machine. Required packages are imported, optional ones are only looked up.

    Raises:
        InputError: the tool itself is not installed as a package, so its requirements are unknown.
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
    """The requirements of the tool and of its extras on this platform.

    Raises:
        InputError: the requirements cannot be read.
    """
    try:
        from packaging.requirements import Requirement
    except ImportError:
        raise InputError("the package packaging is missing; run pip install packaging") from None
    try:
        distribution = metadata.distribution(TOOL)
    except metadata.PackageNotFoundError:
        raise InputError(f"{TOOL} is not installed, so its requirements are unknown; run pip install -e .") from None
    extras = [None, *sorted(distribution.metadata.get_all("Provides-Extra") or [])]
    packages = []
    for line in distribution.requires or []:
        requirement = Requirement(line)
        for extra in extras:
            marker = requirement.marker
            belongs = extra is None or (marker is not None and not marker.evaluate({"extra": ""}))
            if belongs and (marker is None or marker.evaluate({"extra": extra or ""})):
                packages.append(_look_up(requirement, extra))
    return tuple(packages)


def _look_up(requirement: Any, extra: str | None) -> Package:
    """The state of one package; ``requirement`` is a ``packaging.requirements.Requirement``."""
    try:
        installed: str | None = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        installed = None
    fault = None
    if installed is None:
        fault = "missing"
    elif not requirement.specifier.contains(installed, prereleases=True):
        fault = f"too old or too new: {installed} is not {requirement.specifier}"
    elif extra is None:
        fault = _import_fault(requirement.name)
    purpose = PURPOSES.get(requirement.name, "the tool") if extra is None else f"only for {extra}"
    return Package(requirement.name, f"{requirement.name}{requirement.specifier}", installed, purpose, extra, fault)


def _import_fault(name: str) -> str | None:
    """Why a package cannot be imported, in one line."""
    module = _module(name)
    logging.disable(logging.WARNING)  # bitsandbytes logs which optional kernels are missing
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken package can raise anything
        missing = error.name.split(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else module
        if missing != module:
            return f"{WAITS} {missing}"
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"{BROKEN}: {reason}"
    finally:
        logging.disable(logging.NOTSET)
    return None


def _module(name: str) -> str:
    return name.removesuffix("-gpu").replace("-", "_")


def _devices() -> tuple[Device, ...]:
    import torch

    devices = [Device("cpu", f"{_cores_text()}, {torch.backends.cpu.get_cpu_capability()}", None)]
    try:
        for number in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(number)
            devices.append(
                Device(f"cuda:{number}", f"{gpu.name}, capability {gpu.major}.{gpu.minor}", gpu.total_memory)
            )
    except RuntimeError as error:  # a driver of another version
        devices.append(Device("cuda", f"cannot be used: {str(error).splitlines()[0]}", None))
    if torch.backends.mps.is_available():
        devices.append(Device("mps", "Apple's GPU, which shares the machine's memory", None))
    return tuple(devices)


def _cores_text() -> str:
    """How many threads compute unless ``threads`` says otherwise, and what limits them."""
    limits = [f"{usable_cores()} of {os.cpu_count()} cores may be used"]
    quota = cpu_quota()
    if quota is not None:
        limits.append(f"the container has a quota of {quota:g}")
    if VARIABLE in os.environ:
        limits.append(f"{VARIABLE} is {os.environ[VARIABLE]}")
    count = default_threads()
    return f"{count} {'thread' if count == 1 else 'threads'} ({', '.join(limits)})"


def _repairs(packages: Sequence[Package]) -> tuple[str, ...]:
    """pip commands for the required packages: first for absent or outdated ones, then for broken ones."""
    faulty = {package: str(package.fault) for package in packages if package.fault and package.extra is None}
    broken = [package.needed for package, fault in faulty.items() if fault.startswith(BROKEN)]
    absent = [package.needed for package, fault in faulty.items() if not fault.startswith((BROKEN, WAITS))]
    # A package may fail to import because of a module that is no requirement of the tool.
    required = {_module(package.name) for package in packages}
    indirect = {fault.removeprefix(f"{WAITS} ") for fault in faulty.values() if fault.startswith(WAITS)} - required
    commands = (("pip install", [*absent, *sorted(indirect)]), ("pip install --force-reinstall --no-deps", broken))
    return tuple(f"{command} {shlex.join(names)}" for command, names in commands if names)
