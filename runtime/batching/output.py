"""The output file of a batch: absent or whole, and what an interrupted run left is continued."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pos2d.errors import OutputError, Pos2DError, StorageError

try:
    import fcntl
except ImportError:  # Windows has none: two runs are not kept from writing one file there
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class BatchOutput:
    """``path`` appears when it is whole; until then records go to ``PATH.partial``.

    ``recipe`` identifies the run. It is stored next to the partial file, and with the size of the finished output in
    ``PATH.run.json``.
    """

    path: Path
    recipe: Mapping[str, Any]

    @property
    def partial(self) -> Path:
        return self.path.parent / f"{self.path.name}.partial"

    @property
    def partial_note(self) -> Path:
        return self.path.parent / f"{self.path.name}.partial.json"

    @property
    def note(self) -> Path:
        return self.path.parent / f"{self.path.name}.run.json"

    @property
    def files(self) -> tuple[Path, ...]:
        return self.path, self.partial, self.partial_note, self.note

    def is_finished(self, force: bool) -> bool:
        """Whether this run was finished before.

        Raises:
            OutputError: the whole or partial output of another run is there and may not be replaced.
            StorageError: the directory of the output does not exist.
        """
        if not self.path.parent.is_dir():
            raise StorageError(f"{self.path.parent} is not a directory; make it, or write to another one")
        if self.path.is_dir():
            raise OutputError(f"{self.path} is a directory; name a file")
        if force:
            return False
        if self.path.exists():
            finished = {"recipe": self.recipe, "bytes": self.path.stat().st_size}
            if _read_note(self.note) == finished and not self.partial.exists():
                return True
            raise OutputError(f"{self.path} exists{self._difference(self.note)}; `force=True` replaces it")
        # An empty partial file may be replaced: its run ended before it wrote a record.
        if self.partial.exists() and self.partial.stat().st_size and not self._can_continue():
            raise OutputError(
                f"{self.partial} is the beginning of another run{self._difference(self.partial_note)}; finish that "
                "run, or replace it with `force=True`"
            )
        return False

    @contextlib.contextmanager
    def opened(self, force: bool) -> Iterator[tuple[IO[bytes], int]]:
        """Open the partial file for more records, with the number of records in it; it becomes the output at the end.

        Raises:
            OutputError: another process writes the output, or has written it since :meth:`is_finished`.
        """
        with self.partial.open("ab+") as file:
            self._lock(file)
            if self.path.exists() and not force:
                self.partial.unlink()
                raise OutputError(f"{self.path} was written by another process meanwhile; `force=True` replaces it")
            if not self._can_continue():
                file.truncate(0)
                _write_note(self.partial_note, {"recipe": self.recipe})
            count = _drop_partial_line(file)
            try:
                yield file, count
            except (KeyboardInterrupt, SystemExit) as end:
                end.add_note("the same command continues from here")
                raise
            except Pos2DError:
                if not os.fstat(file.fileno()).st_size:
                    self.partial.unlink()
                    self.partial_note.unlink()
                raise
            file.flush()
            os.fsync(file.fileno())
            # In this order a run that ends between two steps is either finished, or unfinished and continues.
            _write_note(self.note, {"recipe": self.recipe, "bytes": file.tell()})
            os.replace(self.partial, self.path)
            self.partial_note.unlink()

    def _difference(self, note: Path) -> str:
        """What differs in the run that ``note`` describes, as part of a sentence."""
        block = _read_note(note)
        theirs = block.get("recipe", {}) if isinstance(block, dict) else {}
        parts = [key for key in self.recipe if theirs and theirs.get(key) != self.recipe[key]]
        names = [name for part in parts for name in _differing(part, theirs.get(part), self.recipe[part])]
        return f", with another {', '.join(names)}" if names else ""

    def _can_continue(self) -> bool:
        """Whether the partial file is the beginning of this run."""
        return bool(_read_note(self.partial_note) == {"recipe": self.recipe})

    def _lock(self, file: IO[bytes]) -> None:
        """Lock the partial file until it is closed.

        Raises:
            OutputError: another process has locked it, or has made it the output before the lock was free.
        """
        busy = OutputError(f"{self.partial} is being written by another process; let it finish")
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise busy from None
        if not self.partial.exists() or not os.path.samestat(os.fstat(file.fileno()), self.partial.stat()):
            raise busy


def write_records(file: IO[bytes], records: bytes) -> None:
    """Append records, one a line, and force them to the disk."""
    file.write(records)
    file.flush()
    os.fsync(file.fileno())


def _differing(part: str, theirs: Any, ours: Any) -> list[str]:
    """Names of the options that differ in ``part`` of a recipe; a part without options has its own name."""
    if part not in ("sampling", "options") or not isinstance(theirs, dict):
        return [part.replace("_", " ")]
    return [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]


def _read_note(path: Path) -> Any:
    """The JSON of a note, or None if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_note(path: Path, block: Mapping[str, Any]) -> None:
    """Write a note as JSON, whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(block, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(new, path)


def _drop_partial_line(file: IO[bytes]) -> int:
    """Drop a last line without its end; return the number of whole lines, with the file positioned after them."""
    file.seek(0)
    count = size = 0
    for line in file:
        if not line.endswith(b"\n"):
            break
        count += 1
        size += len(line)
    file.truncate(size)
    file.seek(size)
    return count
