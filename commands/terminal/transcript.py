"""A conversation in a file: ``{"messages": [{"role": ..., "content": ...}, ...]}``."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pos2d.errors import InputError, OutputError, StorageError


def save_messages(name: str, messages: Sequence[Mapping[str, str]]) -> None:
    """The whole file or none; only a conversation that was saved before is replaced.

    Raises:
        InputError: no name of a file.
        OutputError: another file is there.
        StorageError: it cannot be written.
    """
    path = _path(name)
    if path.exists() and _messages(path) is None:
        raise OutputError(f"{name} exists and is no conversation; choose another name")
    beside = path.with_name(f".{path.name}.new")
    try:
        data = json.dumps({"messages": messages}, indent=2, ensure_ascii=False).encode()
        beside.write_bytes(data + b"\n")
        os.replace(beside, path)
    except OSError as error:
        raise StorageError(f"{name} cannot be written: {error.strerror}") from None


def load_messages(name: str) -> list[Mapping[str, str]]:
    """Raises:
    InputError: no name, or a file of another form.
    StorageError: it cannot be read.
    """
    path = _path(name)
    if not path.is_file():
        raise StorageError(f"{name} cannot be read: there is no such file")
    messages = _messages(path)
    if messages is None:
        raise InputError(f'{name} is no conversation; it must be JSON of the form {{"messages": [...]}}')
    return messages


def _messages(path: Path) -> list[Mapping[str, str]] | None:
    try:
        block: Any = json.loads(path.read_text(encoding="utf-8"))
        messages = block["messages"]
        json.dumps(messages, ensure_ascii=False).encode()  # half characters cannot be saved again
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return messages if isinstance(messages, list) else None


def _path(name: str) -> Path:
    if not name:
        raise InputError("give the name of a file")
    if "\0" in name:
        raise InputError(f"{name!r} is no name of a file")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(f"{name!r} is no name of a file: {error}") from None
    if path.is_dir():
        raise InputError(f"{name} is a directory; give the name of a file")
    return path
