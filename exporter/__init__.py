"""Base + adapter -> artifact. One verb, one file, one function."""

from exporter.export import ExportReport, export
from exporter.inspect import InspectReport, inspect
from exporter.merge import MergeReport, merge
from exporter.plan import PlanReport, plan

__all__ = ["ExportReport", "InspectReport", "MergeReport", "PlanReport", "export", "inspect", "merge", "plan"]
