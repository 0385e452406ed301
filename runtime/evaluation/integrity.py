"""Whether an artifact's files are those that were written, and say the same about the model as its manifest."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pos2d.errors import InputError
from pos2d.families import Dimensions
from pos2d.graph_metadata import REPEATED, differing, differing_keys
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


def check_settings(directory: Path, manifest: Manifest) -> None:
    """Compare the manifest with what graphs and ``config.json`` say of positions, sizes and end tokens.

    Raises:
        InputError: they disagree.
    """
    if manifest.graph is None:
        _check_config(directory, manifest)
        return
    import onnx

    block = manifest.to_dict()
    for graph in manifest.graph.graphs.values():
        model = onnx.load(directory / graph.file, load_external_data=False)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        faults = differing({name: block[name] for name in REPEATED}, metadata)
        for tensor in model.graph.initializer:
            if tensor.name == "rope_axes":
                axes = onnx.numpy_helper.to_array(tensor).tolist()
                faults += differing_keys("axes", {"axes": list(manifest.rope_2d.axes)}, {"axes": axes})
        _raise_for(faults, directory / graph.file, directory)


def _check_config(directory: Path, manifest: Manifest) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    sizes = Dimensions.from_config(config, str(path))
    stated = {name: getattr(manifest, name) for name in ("family", "context_length")}
    found = {name: getattr(sizes, name) for name in stated}
    faults = differing_keys("", stated | {"vocab_size": manifest.vocab_size}, found | {"vocab_size": sizes.vocab})
    if manifest.rope_2d.is_2d or "rope_2d" in config:  # without 2D RoPE the configuration is of the base's own classes
        faults += differing_keys("rope_2d", manifest.rope_2d.to_dict(), config.get("rope_2d"))
    _raise_for(faults, path, directory)


def _raise_for(faults: list[str], path: Path, directory: Path) -> None:
    if faults:
        raise InputError(f"{path} has {faults[0]} as {directory / FILE_NAME} says; make the artifact again")


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
