"""Whether an artifact's files are those that were written."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pos2d.errors import InputError
from pos2d.manifest import FILE_NAME, Manifest
from pos2d.progress import Progress

# Bytes that are hashed at a time.
PIECE_BYTES = 1 << 22


def check_files(directory: Path, manifest: Manifest) -> int:
    """Compare the SHA-256 of every file but the card with the manifest, in weights of a merge that of every tensor.

    Returns the number of files.

    Raises:
        InputError: files whose content is not the one that was written, or a weight file without a readable header.
    """
    ledger: Mapping[str, Mapping[str, Any]] = (manifest.ledger or {}).get("tensors") or {}
    changed: list[str] = []
    with Progress("checking files", manifest.total_bytes, unit="bytes") as progress:
        for name, facts in manifest.checked_files.items():
            path = directory / name
            if "sha256" in facts:
                if _sha256(path, progress) != facts["sha256"]:
                    changed.append(str(path))
            else:
                hashes = {tensor: e["sha256_out"] for tensor, e in ledger.items() if e.get("file") == name}
                changed += [f"{tensor} of {path}" for tensor in _changed_tensors(path, hashes, progress)]
    if changed:
        others = "" if len(changed) == 1 else f" and {len(changed) - 1} more"
        raise InputError(
            f"{changed[0]}{others} changed after the artifact was written: the SHA-256 is not the one that "
            f"{directory / FILE_NAME} states; copy the artifact again, or make it again"
        )
    return len(manifest.checked_files)


def _changed_tensors(path: Path, hashes: Mapping[str, str], progress: Progress) -> Iterator[str]:
    """The names of tensors in a safetensors file whose bytes have another SHA-256 than ``hashes`` states."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length))
            places = {name: header[name]["data_offsets"] for name in hashes}
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} has a damaged header; copy the artifact again, or make it again") from None
        for name, (start, stop) in places.items():
            file.seek(8 + length + start)
            if _digest(file, stop - start, progress) != hashes[name]:
                yield name


def _sha256(path: Path, progress: Progress) -> str:
    with path.open("rb") as file:
        return _digest(file, path.stat().st_size, progress)


def _digest(file: BinaryIO, count: int, progress: Progress) -> str:
    """The SHA-256 of the next ``count`` bytes, in hexadecimal."""
    digest = hashlib.sha256()
    while count > 0 and (piece := file.read(min(count, PIECE_BYTES))):
        digest.update(piece)
        progress.advance(len(piece))
        count -= len(piece)
    return digest.hexdigest()
