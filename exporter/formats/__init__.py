"""What an export can write: each format is a module with the functions of :class:`ExportFormat`."""

from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from pos2d.errors import UsageError
from pos2d.exporter.formats.options import ExportOptions, FormatName
from pos2d.options import options_of
from pos2d.sources.source import Source

# The module of every format, imported when the format is used.
FORMATS: Mapping[FormatName, str] = {
    "onnx": "pos2d.exporter.formats.onnx.format",
    "genai": "pos2d.exporter.formats.genai.format",
    "bnb": "pos2d.exporter.formats.bnb",
    "stock": "pos2d.exporter.formats.stock",
    "gguf": "pos2d.exporter.formats.gguf.format",
}


class Plan(Protocol):
    """What an export will write."""

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence for each way in which the programs that run the artifact depart from the model's files."""


class ExportFormat(Protocol):
    """The functions of a format's module."""

    OPTIONS: Collection[str]  # the fields of ExportOptions that the format takes

    def refuse(self, options: ExportOptions) -> None:
        """Check options before anything is read.

        Raises:
            UsageError: values that the format does not have, or options that contradict each other.
        """

    def plan(self, source: Source, options: ExportOptions) -> Plan:
        """Decide what is written and where it lies; nothing is written yet.

        Raises:
            UsageError, InputError: options or weights with which that is not possible.
        """

    def write(self, source: Source, plan: Any, target: Path) -> dict[str, Any]:
        """Write weights, graphs and settings into the directory ``target``.

        Returns the fields of :class:`pos2d.manifest.Manifest` that the format decides.
        """

    def check(self, staging: Path, source: Source, plan: Any) -> Mapping[str, Any] | None:
        """Compare the finished artifact at ``staging`` with its source; nothing where they cannot be compared.

        Raises:
            ParityError: they differ by more than they may.
        """


def load_format(name: FormatName) -> ExportFormat:
    """The module of a format."""
    return cast(ExportFormat, import_module(FORMATS[name]))


def format_of(options: ExportOptions) -> ExportFormat:
    """The format of an export, its options checked.

    Raises:
        UsageError: options of other formats, or see :meth:`ExportFormat.refuse`.
    """
    chosen = load_format(options.format)
    given = (name for name, declared in options_of(ExportOptions).items() if getattr(options, name) != declared.default)
    foreign = [name for name in given if name not in (*chosen.OPTIONS, "format")]
    if foreign:
        takers = [name for name in FORMATS if set(foreign) & set(load_format(name).OPTIONS)]
        raise UsageError(
            f"{' and '.join(f'`{name}`' for name in foreign)} {'belongs' if len(foreign) == 1 else 'belong'} to "
            f"{' or '.join(f'`format={name!r}`' for name in takers)}; `format={options.format!r}` does not have "
            f"{'it; leave it out' if len(foreign) == 1 else 'them; leave them out'}"
        )
    chosen.refuse(options)
    return chosen
