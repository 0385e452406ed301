"""An output directory that is absent, old and whole, or new and whole: built beside its place, then renamed.

``.NAME.partial`` beside the output holds the directory in the making and, for a merge, its journal; who works there has
locked it. It goes when the run ends, and stays only where an interrupted run has finished something that ``--resume``
can use.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pos2d.errors import InputError, OutputError, StorageError
from pos2d.manifest import FILE_NAME, read_manifest

KEPT = "--resume goes on with what is finished"
JOURNAL, ARTIFACT, REPLACED = "journal.json", "artifact", "replaced"
OURS = {JOURNAL, "journal.new", ARTIFACT, REPLACED}


def check_output(output: Path, *, force: bool = False) -> None:
    """Raises:
    OutputError: the output exists, and may not be replaced.
    """
    obstacle = _obstacle(output)
    if obstacle is not None:
        raise OutputError(f"{output} {obstacle}; choose another output")
    if not force and output.exists() and any(output.iterdir()):
        raise OutputError(f"{output} exists already; choose another output, or replace it with --force")


def _obstacle(output: Path) -> str | None:
    """Why ``output`` may not even be replaced: it holds something that is not ours."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        return "exists already and is not a directory"
    if not output.exists():
        return None
    inside = (path for path in output.rglob("*") if path.is_symlink() or not path.is_dir())
    names = {path.relative_to(output).as_posix() for path in inside}
    try:
        known = {FILE_NAME, *read_manifest(output).files} if names else set()
    except InputError:
        known = set()
    foreign = sorted(names - known)
    return f"exists already and holds {foreign[0]}, which is not part of an artifact" if foreign else None


@contextmanager
def staged(output: Path, *, force: bool = False, resume: bool = False) -> Iterator[Path]:
    """A directory beside ``output``, which takes its place when the block ends well.

    ``force`` replaces an artifact, in one step where the system can, and starts over what an interrupted run left;
    ``resume`` keeps that, and the block finds it in the directory and its journal.

    Raises:
        OutputError: see :func:`check_output`; another run is writing the output, or one was interrupted and neither
            ``force`` nor ``resume`` says what to do about it.
        StorageError: the disk is full, or the place cannot be written.
    """
    check_output(output, force=force)
    workspace = workspace_of(output)
    with _locked(workspace, output):
        _put_back(workspace, output)
        check_output(output, force=force)
        if (workspace / JOURNAL).is_file() and not (resume or force):
            raise OutputError(f"a merge into {output} was interrupted; go on with --resume, or start over with --force")
        try:
            if not resume:
                _clear(workspace)
            (workspace / ARTIFACT).mkdir(exist_ok=True)
            yield workspace / ARTIFACT
            _settle(workspace / ARTIFACT)
            _take_place(workspace, output, force)
            _remove(workspace)
        except BaseException as error:
            # After bad input there is nothing to go on with; after anything else there may be.
            kept = (workspace / JOURNAL).is_file() and not isinstance(error, InputError)
            if not kept:
                _remove(workspace)
            if not isinstance(error, OSError):
                if kept:
                    error.add_note(KEPT)
                raise
            raise _explained(error, output, kept) from None


def workspace_of(output: Path) -> Path:
    whole = Path(os.path.abspath(output))
    return whole.with_name(f".{whole.name}.partial")


def discard_workspace(output: Path) -> None:
    """Remove what a run left beside ``output``; raises OutputError while one is at work there."""
    workspace = workspace_of(output)
    if workspace.is_dir():
        with _locked(workspace, output):
            _remove(workspace)


def file_facts(directory: Path, without: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Bytes and sha256 of every file below ``directory``, by name; the bytes alone of those in ``without``."""
    return {
        name: {"bytes": path.stat().st_size} | ({} if name in without else {"sha256": sha256(path)})
        for path in sorted(directory.rglob("*"))
        if path.is_file() and (name := path.relative_to(directory).as_posix())
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Bring a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(workspace: Path, output: Path) -> Iterator[None]:
    """The workspace, made where it is missing, for this run alone; the lock of a killed run is gone with it."""
    try:
        workspace.mkdir(parents=True, exist_ok=True)
        # The directory itself is locked: a lock file in it would have to be deleted while it is held.
        descriptor = os.open(workspace, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if os.path.lexists(workspace):
            raise OutputError(f"{workspace} is in the way of {output}; move it away") from None
        raise StorageError(f"{output} cannot be created: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(descriptor), os.stat(workspace, follow_symlinks=False))
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise OutputError(f"{output} is being written by another run")
        _refuse_foreign(workspace)
        yield
    finally:
        os.close(descriptor)


def _refuse_foreign(workspace: Path) -> None:
    foreign = sorted(path.name for path in workspace.iterdir() if path.name not in OURS or path.is_symlink())
    if foreign:
        raise OutputError(f"{workspace} holds {foreign[0]}, which is not of this tool; move it away")


def _put_back(workspace: Path, output: Path) -> None:
    """An artifact that had stepped aside for one that never took its place."""
    if (workspace / REPLACED).is_dir() and not output.exists():
        os.rename(workspace / REPLACED, output)


def _clear(workspace: Path) -> None:
    for path in workspace.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove(workspace: Path) -> None:
    """As far as that is possible; what is left is cleared by the next run."""
    with suppress(OSError):
        _clear(workspace)
        workspace.rmdir()


def _settle(directory: Path) -> None:
    """Bring every file to the disk, with the usual permissions (some libraries write private files)."""
    mask = os.umask(0)
    os.umask(mask)
    for path in [*directory.rglob("*"), directory]:
        if path.is_file():
            path.chmod(0o666 & ~mask)
        sync(path)


def _take_place(workspace: Path, output: Path, force: bool) -> None:
    check_output(output, force=force)  # something may have appeared there meanwhile
    artifact = workspace / ARTIFACT
    if not (force and output.exists()):
        os.rename(artifact, output)
    elif not _exchange(artifact, output):
        os.rename(output, workspace / REPLACED)
        try:
            os.rename(artifact, output)
        except OSError:
            _put_back(workspace, output)
            raise
    sync(output.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    swap = 2  # RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS
    here = -100  # AT_FDCWD
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(os.fsencode(one), os.fsencode(other), swap) == 0)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        return bool(libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0)
    return False


def _explained(error: OSError, output: Path, kept: bool) -> OutputError | StorageError:
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
        return OutputError(f"{output} appeared while it was being written; choose another output")
    left = KEPT if kept else "nothing was kept"
    return StorageError(f"{error.filename or output} cannot be written: {error.strerror or error}; {left}")
