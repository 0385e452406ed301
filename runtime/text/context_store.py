"""Where the keys and values of contexts are stored, and what they are bound to."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pos2d import __version__
from pos2d.errors import InputError, StorageError, UsageError
from pos2d.runtime.engine.backend import KVArrays
from pos2d.runtime.engine.prefix_cache import PrefixCache
from pos2d.runtime.text.artifact import LoadedArtifact
from pos2d.runtime.text.cache_place import SUFFIX, check_place, names_one_file
from pos2d.runtime.text.kv_file import read_kv, write_kv

FORMAT = "pos2d context 1"
# Facts of a file that must be those of this call, and what a file belongs to that has others.
OWNERS: Mapping[str, str] = {
    "artifact": "another model",
    "rope_2d": "another model",
    "backend": "another backend or number type",
    "tool_version": "another version of pos2d",
    "ids": "another context",
}


@dataclass(frozen=True, slots=True, eq=False)
class ContextStore:
    """The place that ``cache_context`` names: one file if it ends in ``.safetensors``, else a directory of files.

    A file is bound to the model, to how the backend computes, and to the tokens. What belongs to something else, or is
    damaged, is refused and left as it is.
    """

    artifact: LoadedArtifact
    place: Path

    def fill(self, prefix: PrefixCache, ids: Sequence[int]) -> None:
        """Make ``prefix`` hold ``ids``: from their file, or else they are prefilled, and the file is written.

        Raises:
            InputError: as :meth:`read`, or ``ids`` take more positions than the model has.
            UsageError, StorageError: as :meth:`read` and :meth:`write`.
        """
        if not ids or prefix.ids == list(ids):
            return
        arrays = self.read(ids)
        if arrays is not None:
            prefix.put(ids, arrays)
            return
        self._check_writable()
        prefix.fill_anew(ids)
        self.write(ids, prefix.cache.take(len(ids)))

    def path(self, ids: Sequence[int]) -> Path:
        """The file of a context; in a directory its name is a hash of all that it is bound to."""
        if names_one_file(self.place):
            return self.place
        return self.place / f"{_sha256(json.dumps(self._facts(ids)).encode())[:32]}{SUFFIX}"

    def read(self, ids: Sequence[int]) -> KVArrays | None:
        """The keys and values of ``ids``; None where there is no file.

        Raises:
            InputError: a file that belongs to something else, or is damaged.
            UsageError: something that is no cache of a context.
            StorageError: a file that cannot be read.
        """
        path = self.path(ids)
        check_place(self.place)
        if not os.path.lexists(path):
            return None
        if not path.is_file():
            raise UsageError(f"`cache_context` {path} is not a regular file; name another one")
        form = self.artifact.backend.kv_format
        try:
            return read_kv(path, form, len(ids), lambda facts: self._check_facts(path, facts, ids))
        except ValueError as error:
            raise InputError(f"{path} is damaged ({error}); delete it, and it is written again") from None
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror or error}") from None

    def write(self, ids: Sequence[int], arrays: KVArrays) -> None:
        """Write the file of ``ids``, unless another process has done so meanwhile.

        Raises:
            StorageError: the disk is full, or the place cannot be written.
        """
        with _storage_errors(self.place):
            write_kv(self.path(ids), arrays, self._facts(ids))

    def _facts(self, ids: Sequence[int]) -> dict[str, str]:
        """What the file of ``ids`` is bound to."""
        return {
            "format": FORMAT,
            "artifact": self.artifact.identity,
            "rope_2d": json.dumps(self.artifact.manifest.rope_2d.to_dict(), sort_keys=True),
            "backend": json.dumps(dict(self.artifact.backend.arithmetic), sort_keys=True),
            "tool_version": __version__,
            "ids": f"{len(ids)} tokens, sha256 {_sha256(np.array(ids, dtype='<i8').tobytes())}",
        }

    def _check_facts(self, path: Path, facts: Mapping[str, str], ids: Sequence[int]) -> None:
        expected = self._facts(ids)
        if facts.get("format") != FORMAT:
            raise UsageError(f"{path} is no cache of a context that this version reads; name another `cache_context`")
        others = [owner for name, owner in OWNERS.items() if facts.get(name) != expected[name]]
        if others:
            raise InputError(
                f"{path} has the keys and values of {' and '.join(dict.fromkeys(others))}, and is left as it is; "
                "delete it, or name another `cache_context`: a directory takes any number of contexts and models"
            )

    def _check_writable(self) -> None:
        """Make the directory of the file, before the context is prefilled, which may take minutes.

        Raises:
            StorageError: it cannot be made or written.
        """
        directory = self.place.parent if names_one_file(self.place) else self.place
        with _storage_errors(self.place):
            directory.mkdir(parents=True, exist_ok=True)
            if not os.access(directory, os.W_OK | os.X_OK):
                raise PermissionError("its directory is not writable")


@contextlib.contextmanager
def _storage_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{place} cannot be written: {error.strerror or error}; make room, name another `cache_context`, or leave "
            "it out"
        ) from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
