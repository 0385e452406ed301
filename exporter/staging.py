"""An output directory that is absent or whole: built beside its place, renamed when everything is there."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pos2d.errors import OutputError, StorageError


def refuse_existing(output: Path) -> None:
    """Raises:
    OutputError: the output exists, or another run is writing it.
    """
    if output.exists() or output.is_symlink():
        raise OutputError(f"{output} exists already; choose another output or remove it")
    if _staging_path(output).exists():
        raise OutputError(
            f"{output} is being written, or a run was killed; remove {_staging_path(output)} if none is running"
        )


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A fresh directory beside ``output``: it becomes ``output`` when the block ends well and vanishes when not.

    Raises:
        OutputError: see :func:`refuse_existing`.
        StorageError: the disk is full, or the place cannot be written.
    """
    refuse_existing(output)
    staging = _staging_path(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{output.parent} cannot be created: {error.strerror}") from None
    try:
        staging.mkdir()
    except FileExistsError:
        raise OutputError(f"{output} is being written by another run") from None
    except OSError as error:
        raise StorageError(f"{output} cannot be created: {error.strerror}") from None
    try:
        yield staging
        _settle(staging)
        os.rename(staging, output)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise OutputError(f"{output} appeared while it was being written; choose another output") from None
        raise StorageError(
            f"{error.filename or output} cannot be written: {error.strerror}; nothing was kept"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def file_facts(directory: Path) -> dict[str, dict[str, Any]]:
    """Bytes and sha256 of every file below ``directory``, by name."""
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _staging_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


def _settle(directory: Path) -> None:
    """Bring every file to the disk, with the usual permissions (safetensors writes private files)."""
    mask = os.umask(0)
    os.umask(mask)
    for path in [*directory.rglob("*"), directory]:
        if path.is_file():
            path.chmod(0o666 & ~mask)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
