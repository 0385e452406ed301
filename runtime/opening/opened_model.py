"""Opens a model without loading its weights: an artifact, a plain model, or a base model with adapters."""

import shutil
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from pos2d.manifest import Manifest, is_artifact, read_manifest
from pos2d.sources.base_options import BaseOptions
from pos2d.sources.positions import TrainedPositions

if TYPE_CHECKING:
    from pos2d.sources.source import Source


class TemporaryFolder:
    """A directory that is removed with the last reference to it, or when the process ends."""

    def __init__(self) -> None:
        self.path = Path(mkdtemp(prefix="pos2d-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True, slots=True, eq=False)
class OpenedModel:
    """A model whose weights are not loaded yet.

    ``directory`` has its tokenizer and generation settings, and for an artifact its weights. ``manifest`` is that of
    the artifact, or the one that a merge of ``source`` would write: of a plain model, or of a base with adapters that
    are added while the weights are loaded. ``temporary`` is the directory itself where no other has these files.
    """

    directory: Path
    manifest: Manifest
    source: "Source | None" = None
    temporary: "TemporaryFolder | None" = None

    @property
    def place(self) -> Path:
        """The directory of the artifact or of the base, whose name stays the same from run to run."""
        return self.directory if self.source is None else self.source.base.directory

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided by default."""
        return () if self.source is None else self.source.notes

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence for each default that may be wrong."""
        return () if self.source is None else self.source.warnings


def open_model(
    model: str | Path | None, base: BaseOptions | None = None, positions: TrainedPositions | None = None
) -> OpenedModel:
    """Open ``model``, an artifact or a plain model, or the model that ``base`` names.

    A plain model is a Hugging Face directory, or the id of one on the Hub as ``ORG/NAME@REVISION``.

    Raises:
        UsageError, InputError, UnsafeInputError: see :func:`pos2d.sources.source.read_source` and
            :func:`pos2d.manifest.read_manifest`.
    """
    chosen, trained = base or BaseOptions(), positions or TrainedPositions()
    if model is not None and is_artifact(model) and (chosen, trained) == (BaseOptions(), TrainedPositions()):
        return OpenedModel(Path(model), read_manifest(Path(model)))
    from pos2d.sources.source import read_source

    source = read_source(model, chosen, trained)
    temporary = _small_files(source)
    directory = source.base.directory if temporary is None else temporary.path
    return OpenedModel(directory, _manifest(source), source, temporary)


def _small_files(source: "Source") -> TemporaryFolder | None:
    """The tokenizer and settings that a merge would write, if they are not those of the base."""
    from pos2d.sources.checkpoints.weight_files import CONFIG
    from pos2d.sources.sidecars.sidecars import Sidecars, files_in, write_sidecars

    # An adapter or a directory may be called "base" too, and the base's own files may need to be converted.
    if replace(source.sidecars, tokenizer_of="base") == Sidecars(files_in(source.base.directory)):
        return None
    temporary = TemporaryFolder()
    shutil.copyfile(source.base.directory / CONFIG, temporary.path / CONFIG)
    write_sidecars(source.sidecars, temporary.path, source.base.sizes.family)
    return temporary


def _manifest(source: "Source") -> Manifest:
    """The manifest of a merge that is not written; its files are those of the base."""
    from pos2d.sources.tensors.tensor_plan import plan_tensors

    files: dict[str, Any] = {file: {"bytes": stamp[0]} for file, stamp in source.base.stamps().items()}
    return source.manifest(kind=source.kind, dtype=plan_tensors(source.base, source.adapters).dtype, files=files)
