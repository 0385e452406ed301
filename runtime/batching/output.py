"""The file that a batch writes: absent, or whole; what an interrupted run left is gone on with."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pos2d.errors import OutputError, StorageError

try:
    import fcntl
except ImportError:  # Windows has none: there two runs are not kept from one file
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class BatchOutput:
    """``path`` appears when it is whole; until then records go to ``PATH.partial``. ``recipe`` says which run makes it:
    it stands beside the records, and beside the output in ``PATH.run.json``, with its size."""

    path: Path
    recipe: Mapping[str, Any]

    @property
    def partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial")

    @property
    def partial_note(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial.json")

    @property
    def note(self) -> Path:
        return self.path.with_name(f"{self.path.name}.run.json")

    @property
    def files(self) -> tuple[Path, ...]:
        return self.path, self.partial, self.partial_note, self.note

    def is_finished(self, force: bool) -> bool:
        """Whether this very run was finished before.

        Raises:
            OutputError: another one's output, or its beginning, is there and may not be replaced.
            StorageError: there is no directory for it.
        """
        if not self.path.parent.is_dir():
            raise StorageError(f"{self.path.parent} is no directory; make it, or write elsewhere")
        if self.path.is_dir():
            raise OutputError(f"{self.path} is a directory; name a file")
        if force:
            return False
        if self.path.exists():
            finished = {"recipe": self.recipe, "bytes": self.path.stat().st_size}
            if _read(self.note) == finished and not self.partial.exists():
                return True
            raise OutputError(f"{self.path} exists{self._other(self.note)}; --force replaces it")
        # An empty one is nobody's: its run ended before it wrote anything.
        if self.partial.exists() and self.partial.stat().st_size and not self._goes_on():
            raise OutputError(
                f"{self.partial} is the beginning of another run{self._other(self.partial_note)}; finish that one, or "
                "--force begins anew"
            )
        return False

    @contextlib.contextmanager
    def opened(self, force: bool) -> Iterator[tuple[IO[bytes], int]]:
        """A file to which records are added, and how many of them are there; it takes its place at the end.

        Raises:
            OutputError: another process writes it, or has written it since :meth:`is_finished`.
        """
        with self.partial.open("ab+") as file:
            self._lock(file)
            if self.path.exists() and not force:
                self.partial.unlink()
                raise OutputError(f"{self.path} was written by another process meanwhile; --force replaces it")
            if not self._goes_on():
                file.truncate(0)
                _write(self.partial_note, {"recipe": self.recipe})
            count = _cut_to_lines(file)
            try:
                yield file, count
            except (KeyboardInterrupt, SystemExit) as end:
                end.add_note("the same command goes on from here")
                raise
            file.flush()
            os.fsync(file.fileno())
            # In this order a run that ends between two of them is unfinished, and goes on, or finished.
            _write(self.note, {"recipe": self.recipe, "bytes": file.tell()})
            os.replace(self.partial, self.path)
            self.partial_note.unlink()

    def _other(self, note: Path) -> str:
        """What is not the same in the run that ``note`` tells of."""
        block = _read(note)
        theirs = block.get("recipe", {}) if isinstance(block, dict) else {}
        parts = [key for key in self.recipe if theirs and theirs.get(key) != self.recipe[key]]
        named = [name for part in parts for name in _differing(part, theirs.get(part), self.recipe[part])]
        return f", of another {', '.join(named)}" if named else ""

    def _goes_on(self) -> bool:
        """Whether the records that are there are the beginning of this run."""
        return bool(_read(self.partial_note) == {"recipe": self.recipe})

    def _lock(self, file: IO[bytes]) -> None:
        busy = OutputError(f"{self.partial} is being written by another process; let it finish")
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise busy from None
        # The other process may have put it in its place before the lock was free.
        if not self.partial.exists() or not os.path.samestat(os.fstat(file.fileno()), self.partial.stat()):
            raise busy


def _differing(part: str, theirs: Any, ours: Any) -> list[str]:
    """Names of the options that differ; other parts are their own names."""
    if part not in ("sampling", "options") or not isinstance(theirs, dict):
        return [part.replace("_", " ")]
    return [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(path: Path, block: Mapping[str, Any]) -> None:
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(block, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _cut_to_lines(file: IO[bytes]) -> int:
    """Drop a last line that was not finished; returns how many there are. The file's end is where to go on."""
    file.seek(0)
    count = whole = 0
    for line in file:
        if not line.endswith(b"\n"):
            break
        count += 1
        whole += len(line)
    file.truncate(whole)
    file.seek(whole)
    return count
