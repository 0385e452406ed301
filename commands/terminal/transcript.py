"""A conversation in a file: ``{"messages": [{"role": ..., "content": ...}, ...]}``."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pos2d.errors import InputError, OutputError, StorageError
from pos2d.text_files import read_text


def save_messages(name: str, messages: Sequence[Mapping[str, str]]) -> None:
    """Write a conversation; the file is complete or unchanged. Only a stored conversation is replaced.

    Raises:
        InputError: not a file name.
        OutputError: another kind of file exists under the name.
        StorageError: the file cannot be written.
    """
    path = _path(name)
    if path.exists() and _messages(path) is None:
        raise OutputError(f"{name} exists and is not a conversation; choose another name")
    partial = path.with_name(f".{path.name}.new")
    try:
        data = json.dumps({"messages": messages}, indent=2, ensure_ascii=False).encode()
        partial.write_bytes(data + b"\n")
        os.replace(partial, path)
    except OSError as error:
        raise StorageError(f"{name} cannot be written: {error.strerror}") from None


def load_messages(name: str) -> list[Mapping[str, str]]:
    """Read the messages of a stored conversation.

    Raises:
        InputError: not a file name, or a file of another kind.
        StorageError: the file cannot be read.
    """
    path = _path(name)
    if not path.is_file():
        raise StorageError(f"{name} cannot be read: there is no such file")
    messages = _messages(path)
    if messages is None:
        raise InputError(f'{name} is not a conversation; it must be JSON of the form {{"messages": [...]}}')
    return messages


def _messages(path: Path) -> list[Mapping[str, str]] | None:
    try:
        block: Any = json.loads(read_text(path))
        messages = block["messages"]
        json.dumps(messages, ensure_ascii=False).encode()  # lone surrogates could not be written again
    except (OSError, ValueError, TypeError, KeyError, RecursionError, InputError):
        return None
    return messages if isinstance(messages, list) else None


def _path(name: str) -> Path:
    if not name:
        raise InputError("give the name of a file")
    if "\0" in name:
        raise InputError(f"{name!r} is not a file name")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(f"{name!r} is not a file name: {error}") from None
    if path.is_dir():
        raise InputError(f"{name} is a directory; give the name of a file")
    return path
