"""The contract that exporter and runtime share: positions, layout, artifact manifest, errors."""

__version__ = "0.1.0"
