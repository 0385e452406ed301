"""Base + adapter -> artifact. One verb, one file, one function."""

from exporter.export import ExportReport, export
from exporter.inspect import InspectReport, inspect
from exporter.merge import MergeReport, merge

__all__ = ["ExportReport", "InspectReport", "MergeReport", "export", "inspect", "merge"]
