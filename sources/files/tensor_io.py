"""The bytes of a checkpoint's tensors: read piece by piece, and written, or shared where the file system can."""

import hashlib
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Protocol

from pos2d.dtypes import ITEM_BYTES
from pos2d.errors import InputError
from pos2d.sources.files.pth import read_pth
from pos2d.sources.files.tensor_places import TensorPlace, torch_dtype

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

# File systems that can share blocks between files (btrfs, XFS, bcachefs) share whole ones.
BLOCK = 4096
PIECE_BYTES = 4 << 20
# Elements of a tensor that are computed at once: they stay in the processor's cache.
BLOCK_ELEMENTS = 1 << 16
# Bytes that are read from a mapped file before it is mapped anew, which takes milliseconds.
MAPPED_BYTES = 1 << 28
CLONE_RANGE = 0x4020940D  # FICLONERANGE of Linux
# Windows translates line ends in files that are not opened as binary.
BINARY: int = getattr(os, "O_BINARY", 0)
# Held while a file's position is used, on systems without positioned reads and writes.
_position = Lock()


class TensorFile(Protocol):
    """One open file of a checkpoint; several threads may read it at once."""

    def read_into(self, name: str, place: TensorPlace, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``start`` on."""

    def copy_to(self, place: TensorPlace, start: int, data: memoryview, target: int, offset: int) -> None:
        """Write ``data``, the tensor's bytes from ``start`` on, at ``offset`` of the file descriptor ``target``."""

    def close(self) -> None: ...


class SafetensorsFile:
    """A safetensors file; with ``forget``, the system's cache drops what was read."""

    def __init__(self, path: Path, forget: bool = False) -> None:
        self._path, self._forget = path, forget
        self._file = os.open(path, os.O_RDONLY | BINARY)
        self._shares_blocks = sys.platform == "linux"

    def read_into(self, name: str, place: TensorPlace, start: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = _read_at(self._file, buffer[done:], place.offset + start + done)
            if count == 0:
                raise InputError(f"{self._path}: tensor {name} is truncated; the file changed while it was read")
            done += count
        if self._forget:
            forget_cached(self._file, place.offset + start, len(buffer))

    def copy_to(self, place: TensorPlace, start: int, data: memoryview, target: int, offset: int) -> None:
        source, whole = place.offset + start, len(data) // BLOCK * BLOCK
        if self._shares_blocks and whole and (source | offset) % BLOCK == 0:
            import fcntl

            try:
                fcntl.ioctl(target, CLONE_RANGE, struct.pack("=qQQQ", self._file, source, whole, offset))
                data, offset = data[whole:], offset + whole
            except OSError:
                self._shares_blocks = False
        write_at(target, data, offset)

    def close(self) -> None:
        os.close(self._file)


class PthFile:
    """A file of ``torch.save``; its tensors are mapped, not loaded.

    Pages that were read count as this process's memory until the file is unmapped, so now and then it is mapped anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors = read_pth(path)
        self._read = 0

    def read_into(self, name: str, place: TensorPlace, start: int, buffer: memoryview) -> None:
        if self._read > MAPPED_BYTES:
            self._read = 0
            self._tensors = read_pth(self._path)
        buffer[:] = self._bytes(name)[start : start + len(buffer)].data
        self._read += len(buffer)

    def copy_to(self, place: TensorPlace, start: int, data: memoryview, target: int, offset: int) -> None:
        write_at(target, data, offset)

    def close(self) -> None:
        self._tensors.clear()

    def _bytes(self, name: str) -> "npt.NDArray[np.uint8]":
        import torch

        tensors = self._tensors
        tensor = tensors[name]
        if not tensor.is_contiguous():
            tensor = tensors[name] = tensor.contiguous()
        flat: npt.NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
        return flat


def open_tensors(path: Path, forget: bool = False) -> TensorFile:
    """Open a file of either form; ``forget`` has an effect on safetensors files only.

    Raises:
        InputError, UnsafeInputError: as :func:`pos2d.sources.files.pth.read_pth`, for a file of ``torch.save``.
    """
    return SafetensorsFile(path, forget) if path.suffix == ".safetensors" else PthFile(path)


@contextmanager
def opened(directory: Path, files: Iterable[str], forget: bool = False) -> Iterator[Mapping[str, TensorFile]]:
    """Open files of a checkpoint, by name, until the ``with`` block ends; see :func:`open_tensors`."""
    with ExitStack() as stack:
        by_name: dict[str, TensorFile] = {}
        for file in files:
            by_name[file] = open_tensors(directory / file, forget)
            stack.callback(by_name[file].close)
        yield by_name


def create_file(path: Path) -> int:
    """A descriptor of a new file for :func:`write_at`; a file that exists already is an OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | BINARY, 0o666)


def sha256_of(file: TensorFile, name: str, place: TensorPlace) -> str:
    """The SHA-256 of a tensor's bytes, in hexadecimal, as far as the result has their rows."""
    digest = hashlib.sha256()
    for start, count in pieces(place.kept_nbytes, PIECE_BYTES):
        buffer = memoryview(bytearray(count))
        file.read_into(name, place, start, buffer)
        digest.update(buffer)
    return digest.hexdigest()


def row_blocks(
    file: TensorFile, name: str, place: TensorPlace, elements: int = BLOCK_ELEMENTS
) -> "Iterator[tuple[slice, memoryview, torch.Tensor]]":
    """Blocks of about ``elements`` values: their rows, bytes, and float64 values.

    The bytes are valid until the next block. Rows that the file does not have are zeros, and have no bytes.
    """
    import torch

    size = ITEM_BYTES[place.dtype]
    columns = place.shape[1] if len(place.shape) > 1 else 1
    height = max(1, elements // columns)
    buffer = memoryview(bytearray(min(height, place.shape[0]) * columns * size))
    for start in range(0, place.shape[0], height):
        rows = slice(start, min(start + height, place.shape[0]))
        kept = max(min(rows.stop, place.kept_rows) - start, 0)
        data = buffer[: kept * columns * size]
        values = torch.empty(0, dtype=torch.float64)
        if kept:
            file.read_into(name, place, start * columns * size, data)
            values = torch.frombuffer(data, dtype=torch_dtype(place.dtype)).double()
        values = values.reshape(-1, *place.shape[1:])
        missing = rows.stop - start - kept
        yield rows, data, torch.cat([values, values.new_zeros(missing, *place.shape[1:])]) if missing else values


def forget_cached(file: int, offset: int, length: int) -> None:
    """Tell the system that a range (length 0: to the end) will not be read again soon."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, offset, length, os.POSIX_FADV_DONTNEED)


def write_at(file: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``; a single write of the system may be shorter."""
    while data:
        if hasattr(os, "pwrite"):
            count = os.pwrite(file, data, offset)
        else:
            with _position:
                os.lseek(file, offset, os.SEEK_SET)
                count = os.write(file, data)
        data, offset = data[count:], offset + count


def pieces(total: int, size: int, first: int = 0) -> Iterator[tuple[int, int]]:
    """Start and length of every piece of ``total`` bytes; a ``first`` other than 0 is the length of the first piece."""
    if first:
        yield 0, min(first, total)
    yield from ((start, min(size, total - start)) for start in range(first, total, size))


def _read_at(file: int, buffer: memoryview, offset: int) -> int:
    """Read at most ``len(buffer)`` bytes from ``offset`` on; returns how many, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(file, [buffer], offset)
    with _position:
        os.lseek(file, offset, os.SEEK_SET)
        data = os.read(file, len(buffer))
    buffer[: len(data)] = data
    return len(data)
