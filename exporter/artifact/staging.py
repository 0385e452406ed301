"""Output directories that are always complete, the old one or the new one: built in a workspace, then renamed.

The workspace ``.NAME.partial``, in the same parent directory, holds the unfinished directory and, for a merge, its
journal; the run that uses it holds a lock on it. It is deleted when the run ends, unless an interrupted merge has
finished shards from which it can be resumed.
"""

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pos2d.errors import InputError, OutputError, StorageError
from pos2d.hashing import sha256
from pos2d.manifest import FILE_NAME, read_manifest

try:
    import fcntl
except ImportError:  # Windows has none: there, nothing keeps two runs from writing one output
    fcntl = None  # type: ignore[assignment]

RESUMABLE = "`resume=True` continues with what is finished"
JOURNAL, ARTIFACT, REPLACED = "journal.json", "artifact", "replaced"
OURS = {JOURNAL, "journal.new", ARTIFACT, REPLACED}


def check_output(output: Path, *, force: bool = False) -> None:
    """Check that ``output`` may be written.

    Raises:
        OutputError: it exists, and may not be replaced.
    """
    obstacle = _obstacle(output)
    if obstacle is not None:
        raise OutputError(f"{output} {obstacle}; choose another output")
    if not force and output.exists() and any(output.iterdir()):
        raise OutputError(f"{output} exists already; choose another output, or replace it with `force=True`")


def _obstacle(output: Path) -> str | None:
    """Why ``output`` may not be replaced even with ``force``: it holds something that is not part of an artifact."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        return "exists already and is not a directory"
    if not output.exists():
        return None
    paths = (path for path in output.rglob("*") if path.is_symlink() or not path.is_dir())
    names = {path.relative_to(output).as_posix() for path in paths}
    try:
        of_artifact = {FILE_NAME, *read_manifest(output).files} if names else set()
    except InputError:
        of_artifact = set()
    foreign = sorted(names - of_artifact)
    return f"exists already and holds {foreign[0]}, which is not part of an artifact" if foreign else None


@contextmanager
def staged(output: Path, *, force: bool = False, resume: bool = False) -> Iterator[Path]:
    """A directory to write into, which becomes ``output`` when the ``with`` block ends without an error.

    ``force`` replaces an artifact, in one step where the system can, and deletes what an interrupted run left.
    ``resume`` keeps what an interrupted run left: it is in the directory, and in the journal next to it.

    Raises:
        OutputError: see :func:`check_output`; another run is writing the output, or one was interrupted and neither
            ``force`` nor ``resume`` is set.
        StorageError: the disk is full, or the directory cannot be written.
    """
    check_output(output, force=force)
    workspace = workspace_of(output)
    with _locked(workspace, output):
        _put_back(workspace, output)
        check_output(output, force=force)
        if (workspace / JOURNAL).is_file() and not (resume or force):
            raise OutputError(
                f"a merge into {output} was interrupted; continue with `resume=True`, or start over with `force=True`"
            )
        try:
            if not resume:
                _clear(workspace)
            (workspace / ARTIFACT).mkdir(exist_ok=True)
            yield workspace / ARTIFACT
            _sync_tree(workspace / ARTIFACT)
            _move_into_place(workspace, output, force)
            _remove(workspace)
        except BaseException as error:
            # A merge of bad input would fail again, so it is not resumable.
            resumable = (workspace / JOURNAL).is_file() and not isinstance(error, InputError)
            if not resumable:
                _remove(workspace)
            if not isinstance(error, OSError):
                if resumable:
                    error.add_note(RESUMABLE)
                raise
            raise _explained(error, output, resumable) from None


def workspace_of(output: Path) -> Path:
    """The directory in which ``output`` is built."""
    absolute = Path(os.path.abspath(output))
    return absolute.with_name(f".{absolute.name}.partial")


def discard_workspace(output: Path) -> None:
    """Delete the workspace that a run left; raises OutputError while a run is using it."""
    workspace = workspace_of(output)
    if workspace.is_dir():
        with _locked(workspace, output):
            _remove(workspace)


def file_facts(directory: Path, without: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below ``directory``, by name; only the size for names in ``without``."""
    return {
        name: {"bytes": path.stat().st_size} | ({} if name in without else {"sha256": sha256(path)})
        for path in sorted(directory.rglob("*"))
        if path.is_file() and (name := path.relative_to(directory).as_posix())
    }


def sync(path: Path) -> None:
    """Write a file or a directory through to the disk; directories only where the system can open them."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(path, os.O_RDONLY)
    elif path.is_dir():
        return
    else:
        descriptor = os.open(path, os.O_RDWR)  # Windows syncs only files that are open for writing
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(workspace: Path, output: Path) -> Iterator[None]:
    """Create the workspace if it is missing and lock it for this run; the system releases the lock of a killed run."""
    try:
        workspace.mkdir(parents=True, exist_ok=True)
        descriptor = _open_directory(workspace)
    except OSError as error:
        if os.path.lexists(workspace):
            raise OutputError(f"{workspace} is in the way of {output}; move it away") from None
        raise StorageError(f"{output} cannot be created: {error.strerror}") from None
    try:
        if descriptor is not None and not _lock(descriptor, workspace):
            raise OutputError(f"{output} is being written by another run")
        _refuse_foreign(workspace)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _open_directory(workspace: Path) -> int | None:
    """A descriptor of the workspace, which may not be a link; None where the system cannot lock directories."""
    if fcntl is not None and hasattr(os, "O_DIRECTORY"):
        return os.open(workspace, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    if workspace.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(workspace))
    return None


def _lock(descriptor: int, workspace: Path) -> bool:
    """Lock the open directory itself, as a lock file in it would have to be deleted while it is held.

    False if another run holds the lock, or replaced the directory before this one got it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.stat(workspace, follow_symlinks=False))
    except (BlockingIOError, FileNotFoundError):
        return False


def _refuse_foreign(workspace: Path) -> None:
    foreign = sorted(path.name for path in workspace.iterdir() if path.name not in OURS or path.is_symlink())
    if foreign:
        raise OutputError(f"{workspace} holds {foreign[0]}, which this tool did not write; move it away")


def _put_back(workspace: Path, output: Path) -> None:
    """Restore an old artifact that was moved aside for a new one that never took its place."""
    if (workspace / REPLACED).is_dir() and not output.exists():
        os.rename(workspace / REPLACED, output)


def _clear(workspace: Path) -> None:
    for path in workspace.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove(workspace: Path) -> None:
    """Delete the workspace as far as possible; the next run deletes the rest."""
    with suppress(OSError):
        _clear(workspace)
        workspace.rmdir()


def _sync_tree(directory: Path) -> None:
    """Write every file through to the disk, with default permissions (some libraries create private files)."""
    mask = os.umask(0)
    os.umask(mask)
    for path in [*directory.rglob("*"), directory]:
        if path.is_file():
            path.chmod(0o666 & ~mask)
        sync(path)


def _move_into_place(workspace: Path, output: Path, force: bool) -> None:
    check_output(output, force=force)  # another program may have created it meanwhile
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
    """Swap two names in one step; False if the system or the file system cannot."""
    if sys.platform not in ("darwin", "linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    swap = 2  # RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS
    cwd = -100  # AT_FDCWD
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(os.fsencode(one), os.fsencode(other), swap) == 0)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        return bool(libc.renameat2(cwd, os.fsencode(one), cwd, os.fsencode(other), swap) == 0)
    return False


def _explained(error: OSError, output: Path, resumable: bool) -> OutputError | StorageError:
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
        return OutputError(f"{output} appeared while it was being written; choose another output")
    outcome = RESUMABLE if resumable else "nothing was kept"
    return StorageError(f"{error.filename or output} cannot be written: {error.strerror or error}; {outcome}")
