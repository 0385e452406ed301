"""Turns a base and its adapters into artifacts: one verb, one file, one function."""

from pos2d.exporter.export import ExportReport, export
from pos2d.exporter.inspect import InspectReport, inspect
from pos2d.exporter.merge import MergeReport, merge
from pos2d.exporter.plan import PlanReport, plan
from pos2d.exporter.push import PushReport, push

__all__ = [
    "ExportReport",
    "InspectReport",
    "MergeReport",
    "PlanReport",
    "PushReport",
    "export",
    "inspect",
    "merge",
    "plan",
    "push",
]
