"""Base + adapter -> artifact. One verb, one file, one function."""

from exporter.export import ExportReport, export
from exporter.merge import MergeReport, merge

__all__ = ["ExportReport", "MergeReport", "export", "merge"]
