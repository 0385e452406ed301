"""A safetensors file of keys and values: written whole or not at all, and checked before any value is used."""

import contextlib
import glob
import hashlib
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from pos2d.dtypes import SAFETENSORS_NAMES
from pos2d.runtime.engine.backend import KVArrays, KVFormat

# The fact that is the hash of all values.
DATA = "data"
# Age in seconds from which the directory of an unfinished file is one that a killed process left.
ABANDONED = 3600


def write_kv(path: Path, arrays: KVArrays, facts: Mapping[str, str]) -> None:
    """Write keys and values, with ``facts`` and a hash of all bytes as the file's metadata.

    A file that another process has written meanwhile stays.

    Raises:
        OSError: the disk is full, or the directory cannot be written.
    """
    _remove_abandoned(path)
    # A directory, because safetensors may write through a temporary file of its own.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        unfinished = partial / path.name
        _save(arrays, unfinished, {**facts, DATA: _digest(arrays)})
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        if not path.exists():
            os.replace(unfinished, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_kv(path: Path, form: KVFormat, length: int, check: Callable[[Mapping[str, str]], None]) -> KVArrays:
    """Read the keys and values of ``length`` tokens; ``check`` gets the facts first.

    Raises:
        ValueError: a damaged file, names, types or shapes other than those of ``form``, or values that are not finite.
        OSError: it cannot be read.
        Any error of ``check``.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework=form.framework) as file:
            facts = file.metadata() or {}
            check(facts)
            names = file.keys()
            _check_layout({name: file.get_slice(name) for name in names}, form, length)
            arrays = {name: file.get_tensor(name) for name in form.shapes(length)}
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if _digest(arrays) != facts.get(DATA):
        raise ValueError("its bytes are not those that were written")
    for name, array in arrays.items():
        if not math.isfinite(_total(array)):
            raise ValueError(f"{name} has values that are not finite")
    return arrays


def _check_layout(slices: Mapping[str, Any], form: KVFormat, length: int) -> None:
    """Check names, types and shapes, of which nothing is in memory yet.

    Raises:
        ValueError: one is not as expected.
    """
    expected = form.shapes(length)
    if set(slices) != set(expected):
        raise ValueError(f"{min(set(slices) ^ set(expected))} is missing or unknown")
    dtype = SAFETENSORS_NAMES[form.dtype]
    for name, shape in expected.items():
        found = slices[name]
        if (found.get_dtype(), tuple(found.get_shape())) != (dtype, shape):
            raise ValueError(f"{name} is {found.get_dtype()} {found.get_shape()}, not {dtype} {list(shape)}")


def _total(array: Any) -> float:
    """The sum in float32, which is not finite if a value is not."""
    if isinstance(array, np.ndarray):
        with np.errstate(all="ignore"):
            return float(array.sum(dtype=np.float32))
    import torch

    return float(array.sum(dtype=torch.float32))


def _digest(arrays: KVArrays) -> str:
    """The SHA-256 of all names and bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(_bytes(arrays[name]))
    return digest.hexdigest()


def _bytes(array: Any) -> memoryview:
    if not isinstance(array, np.ndarray):
        import torch

        array = array.view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def _save(arrays: KVArrays, path: Path, facts: dict[str, str]) -> None:
    """Write a file of numpy's arrays or of torch's.

    Raises:
        OSError: the disk is full or failing.
    """
    from safetensors import SafetensorError

    framework = "numpy" if all(isinstance(array, np.ndarray) for array in arrays.values()) else "torch"
    try:
        import_module(f"safetensors.{framework}").save_file(dict(arrays), path, facts)
    except SafetensorError as error:
        raise OSError(str(error).rpartition("I/O error: ")[2]) from None


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes left of this file."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > ABANDONED:
                shutil.rmtree(partial)
