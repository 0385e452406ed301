"""Say what every format of a model needs, which of them fit, and how the best of those is made; no weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pos2d.errors import UsageError
from pos2d.exporter.inputs.base import read_base
from pos2d.exporter.planning.options import (
    Option,
    Subject,
    artifact_sizes,
    options_of_artifact,
    options_of_base,
    own_dtype,
)
from pos2d.footprint import Footprint, Workload
from pos2d.graph_recipe import GraphQuant
from pos2d.manifest import FILE_NAME, Kind
from pos2d.recipe import Quant
from pos2d.units import parse_size, size_text

# Best first. A card is as fast in 16 bits as in fewer, so there the smallest loss that fits is all that counts. On the
# CPU graphs are faster than torch, and quantised ones than floats; of those that fit, what loses little comes
# first, torch's 8 bits where the graph's do not fit among them.
ON_CARD: Mapping[tuple[Kind, Quant | GraphQuant | None], str] = {
    ("merged", None): "16 bits lose least, and they fit",
    ("bnb", "8bit"): "16 bits do not fit; 8 lose less than 4",
    ("bnb", "nf4"): "nothing larger fits the card",
    ("onnx", "int8"): "nothing fits the card; this runs on the CPU",
    ("onnx", "int4"): "nothing fits the card; this runs on the CPU, and 4 bits lose much in small models",
}
ON_CPU: Mapping[tuple[Kind, Quant | GraphQuant | None], str] = {
    ("onnx", "int8"): "the fastest on the CPU that loses little, and it fits",
    ("bnb", "8bit"): "the int8 graph does not fit; this is slower, but 8 bits lose less than 4",
    ("onnx", "int4"): "8 bits do not fit; 4 lose much in small models",
    ("bnb", "nf4"): "nothing else fits; 4 bits lose much in small models",
}
NOTHING = "nothing fits; free memory, or ask for a shorter context or fewer branches"


@dataclass(frozen=True, slots=True)
class PlanReport:
    """The ``options`` for ``model``, the names of those that fit, and the ``recommended`` one; sizes in bytes.

    ``context``: positions of all branches together, at most those of the model.
    """

    model: str
    what: str
    branches: int
    context: int
    memory_available: int
    gpu_memory: int | None
    options: tuple[Option, ...]
    fitting: tuple[str, ...]
    recommended: str | None
    reason: str

    def lines(self) -> list[str]:
        """A table for people, then the recommendation with its commands."""
        card = "" if self.gpu_memory is None else f", {size_text(self.gpu_memory)} of a card"
        asked = f"{self.context:,} positions, {self.branches} branch{'es' if self.branches > 1 else ''}"
        head = f"{self.model}: {self.what}; {asked}; {size_text(self.memory_available)} of memory available{card}"
        chosen = next((option for option in self.options if option.name == self.recommended), None)
        if chosen is None:
            return [head, *self._table(), "", self.reason]
        used = chosen.ram if chosen.vram is None or self.gpu_memory is None else chosen.vram
        told = f"{chosen.name}: {self.reason} ({_parts(used)})"
        return [head, *self._table(), "", told, *(f"  {command}" for command in chosen.commands)]

    def _table(self) -> list[str]:
        rows = [("format", "disk", "RAM", "VRAM", "fits", "note")]
        for option in self.options:
            sizes = (option.disk, option.ram.peak, option.vram.peak if option.vram else None)
            disk, ram, vram = ("-" if size is None else size_text(size) for size in sizes)
            rows.append((option.name, disk, ram, vram, "yes" if option.name in self.fitting else "no", option.note))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        aligned = (
            [row[0].ljust(widths[0]), *map(str.rjust, row[1:5], widths[1:5]), row[5]]  # numbers to the right
            for row in rows
        )
        return [f"  {'  '.join(cells)}".rstrip() for cells in aligned]


def plan(
    model: str | Path, *, gpu_memory: str | int | None = None, branches: int = 1, context: int = 4096
) -> PlanReport:
    """What each format of ``model``, a base or an artifact, needs; from its configuration, headers and manifest alone.

    Args:
        model: a base as ``merge`` takes it, or an artifact's directory.
        gpu_memory: of a card, such as ``8GB``; left out, formats are held against the memory that this machine has
            available.
        branches: prompts that are answered side by side.
        context: positions in the cache at the end, those of all branches together.

    Raises:
        UsageError: a size that cannot be read, or a number below 1.
        InputError: see :func:`pos2d.exporter.inputs.base.read_base` and :func:`pos2d.manifest.read_manifest`.
        UnsafeInputError: weights that would run code.
    """
    import psutil

    card = None if gpu_memory is None else parse_size(gpu_memory, "--gpu-memory")
    for flag, number in (("--branches", branches), ("--context", context)):
        if number < 1:
            raise UsageError(f"{flag} {number} must be at least 1")
    base = None if (Path(model) / FILE_NAME).is_file() else read_base(model)
    sizes, what = artifact_sizes(Path(model)) if base is None else (base.sizes, f"base model, {own_dtype(base)}")
    positions = min(context, sizes.context_length)
    subject = Subject(sizes, Workload.of(branches, positions), on_card=card is not None)
    options = options_of_artifact(Path(model), subject) if base is None else options_of_base(base, str(model), subject)
    available = psutil.virtual_memory().available
    fitting = [option for option in options if option.fits(available, card)]
    chosen, reason = recommend(fitting, on_card=card is not None)
    if len(options) == len(fitting) == 1:
        chosen, reason = options[0].name, "it fits"  # an artifact that is all that can be made of it
    return PlanReport(
        model=str(model),
        what=what,
        branches=branches,
        context=positions,
        memory_available=available,
        gpu_memory=card,
        options=tuple(options),
        fitting=tuple(option.name for option in fitting),
        recommended=chosen,
        reason=reason,
    )


def recommend(fitting: Sequence[Option], *, on_card: bool) -> tuple[str | None, str]:
    """The name of the best of the options that fit, and why; no name where none will do."""
    for way, reason in (ON_CARD if on_card else ON_CPU).items():
        for option in fitting:
            if (option.form.kind, option.form.quant) == way and (
                option.form.kind != "merged" or option.form.width == 2
            ):
                return option.name, reason
    return None, NOTHING


def _parts(used: Footprint) -> str:
    parts = (("weights", used.weights), ("cache", used.cache), ("activations", used.activations))
    held = ", ".join(f"{name} {size_text(size)}" for name, size in (*parts, ("process", used.process)))
    peaks_early = used.loading > used.weights + used.cache + used.activations
    return f"{held}; at its peak, while loading, weights {size_text(used.loading)}" if peaks_early else held
