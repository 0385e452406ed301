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
    """``path`` appears when it is whole; until then records go to ``PATH.partial``. ``recipe`` says which run makes it,
    and stands in ``PATH.run.json``."""

    path: Path
    recipe: Mapping[str, Any]

    @property
    def partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial")

    @property
    def note(self) -> Path:
        return self.path.with_name(f"{self.path.name}.run.json")

    def is_finished(self, force: bool) -> bool:
        """Whether this very run was finished before.

        Raises:
            OutputError: another one's output, or its beginning, is there and may not be replaced.
            StorageError: there is no directory for it.
        """
        if not self.path.parent.is_dir():
            raise StorageError(f"{self.path.parent} is no directory; make it, or write elsewhere")
        same = self._noted() == self.recipe
        if force:
            return False
        if self.path.exists():
            if same and not self.partial.exists():
                return True
            raise OutputError(f"{self.path} exists; --force replaces it")
        if self.partial.exists() and not same:
            raise OutputError(
                f"{self.partial} is the beginning of a run with another input, artifact or options; finish that one, "
                "or --force begins anew"
            )
        return False

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[IO[bytes], int]]:
        """A file to which records are added, and how many of them are there; it takes its place at the end.

        Raises:
            OutputError: another process writes it.
        """
        same = self._noted() == self.recipe
        with self.partial.open("ab+") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise OutputError(f"{self.partial} is being written by another process; let it finish") from None
            if not same:
                file.truncate(0)
                self._write_note()
            count = _cut_to_lines(file)
            try:
                yield file, count
            except (KeyboardInterrupt, SystemExit) as end:
                end.add_note("the same command goes on from here")
                raise
            file.flush()
            os.fsync(file.fileno())
            os.replace(self.partial, self.path)

    def _noted(self) -> Any:
        try:
            return json.loads(self.note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _write_note(self) -> None:
        beside = self.note.with_name(f"{self.note.name}.new")
        beside.write_text(json.dumps(self.recipe, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(beside, self.note)


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
