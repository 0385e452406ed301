"""What this machine has, and what is missing."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pos2d.commands.shared.flags import json_flag
from pos2d.commands.shared.help import SectionedCommand
from pos2d.commands.shared.report import show
from pos2d.commands.shared.tables import table
from pos2d.units import size_text

if TYPE_CHECKING:
    from pos2d.runtime import DoctorReport
    from pos2d.runtime.doctor import Device, Package

Row = tuple[str, str, str]


@click.command(cls=SectionedCommand)
@json_flag
def doctor(as_json: bool) -> None:
    """Show the versions, devices and memory of this machine, and what is missing."""
    from pos2d import runtime

    report = runtime.doctor()
    show(report, as_json, report_text(report))
    report.raise_if_unfit()


def report_text(report: "DoctorReport") -> str:
    """Versions, devices and free space, then what is wrong and the commands that repair it."""
    rows = [("python", report.python, report.platform), ("pos2d", report.tool, "")]
    rows += [_package_row(package) for package in report.packages]
    rows += [_device_row(device) for device in report.devices]
    rows.append(("onnxruntime", "", f"built with {', '.join(report.providers) or 'nothing'}"))
    if report.memory is not None and report.memory_available is not None:
        rows.append(("memory", "", f"{size_text(report.memory_available)} of {size_text(report.memory)} available"))
    rows.append(("disk", "", f"{size_text(report.disk_free)} free in {Path.cwd()}"))
    faults = [f"{package.name}: {package.fault}, needed for {package.purpose}" for package in report.faults]
    repairs = [f"  {command}" for command in report.repairs]
    return "\n".join([table((), rows), "", *(faults or ["everything that is needed is there"]), *repairs])


def _package_row(package: "Package") -> Row:
    facts = [package.purpose]
    if package.extra:
        facts.append("optional")
    if package.fault and package.installed:
        facts.append(package.short_fault)
    return package.name, package.installed or "missing", ", ".join(facts)


def _device_row(device: "Device") -> Row:
    memory = "" if device.memory is None else f", {size_text(device.memory)}"
    return device.name, "", device.about + memory
