"""The files of an artifact that are published, and what of this machine is left out of them."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PureWindowsPath
from typing import Any

from pos2d.errors import InputError
from pos2d.manifest import CARD, FILE_NAME, Manifest
from pos2d.sources.files.json_object import read_json_object
from pos2d.sources.sidecars.sidecars import SPECIAL_TOKENS, VOCABULARIES

# Values that are texts of the model, whatever they look like.
TEXT_FILES = (*VOCABULARIES, SPECIAL_TOKENS, "added_tokens.json")
TEXT_KEYS = re.compile(r".*_token|.*_tokens|added_tokens_decoder|chat_template")
# An absolute path of two parts at least, or one in the home directory.
LOCAL_PATH = re.compile(r"(?:/[^/\0\n]+){2,}/?|~/.+|[A-Za-z]:[\\/].+|\\\\[^\\]+\\.+")
HUB_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
CURE = "copy the artifact again, or make it again"
# What the Hub stores as large files: by size, and in a new repository by name.
LARGE_BYTES = 10_000_000
LARGE_NAMES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.onnx", "*.npz", "*.model", "*.pb", "*.msgpack", "*.h5")


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file as it is sent; ``large``: the Hub is expected to store it as a large file (LFS or Xet)."""

    name: str
    bytes: int
    large: bool


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """What is sent of an artifact.

    ``files`` are sent, from the directory or as ``changed`` has them. ``unlisted``: names of files that are not sent,
    because the manifest does not have them. ``paths``: by file, the keys whose local path is sent as its last name.
    """

    directory: Path
    files: tuple[PublishedFile, ...]
    changed: Mapping[str, bytes]
    unlisted: tuple[str, ...]
    paths: Mapping[str, tuple[str, ...]]


def contents_of(directory: Path, manifest: Manifest) -> Contents:
    """The files that ``manifest`` lists, the manifest itself, and the card if there is one.

    A path of this machine in a settings file is sent as its last name, with the hash of that file in the manifest that
    is sent; the artifact itself is not changed.

    Raises:
        InputError: a file holds a token of the Hub, or settings or the metadata of the card cannot be read.
    """
    names = sorted({*manifest.checked_files, FILE_NAME} | ({CARD} if (directory / CARD).is_file() else set()))
    changed, paths = _without_paths(directory, [name for name in manifest.checked_files if _holds_settings(name)])
    if CARD in names:
        _check_card(directory / CARD)
    for name in [name for name in names if _holds_settings(name) or name == CARD]:
        if HUB_TOKEN.search((directory / name).read_bytes()):
            raise InputError(
                f"{directory / name} holds what looks like a token of the Hub (hf_…); take it out, and revoke the token"
            )
    found = (path for path in sorted(directory.rglob("*")) if path.is_symlink() or not path.is_dir())
    unlisted = tuple(name for path in found if (name := path.relative_to(directory).as_posix()) not in names)
    sizes = {name: len(changed[name]) if name in changed else (directory / name).stat().st_size for name in names}
    files = tuple(PublishedFile(name, size, _is_large(name, size)) for name, size in sizes.items())
    return Contents(directory, files, changed, unlisted, paths)


def _without_paths(directory: Path, settings: list[str]) -> tuple[dict[str, bytes], dict[str, tuple[str, ...]]]:
    """The settings and the manifest whose paths are replaced, as they are sent, and the keys of the paths."""
    changed: dict[str, bytes] = {}
    paths: dict[str, tuple[str, ...]] = {}

    def send(name: str, block: Any) -> None:
        changed[name] = (json.dumps(block, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()

    for name in settings:
        block = read_json_object(directory / name, CURE)
        found = tuple(_replaced(block))
        if found:
            paths[name] = found
            send(name, block)
    block = read_json_object(directory / FILE_NAME, CURE)
    for name in changed:
        facts = {"bytes": len(changed[name]), "sha256": hashlib.sha256(changed[name]).hexdigest()}
        block["files"][name] = facts
    found = tuple(_replaced(block))
    if found:
        paths[FILE_NAME] = found
    if found or changed:
        send(FILE_NAME, block)
    return changed, paths


def _replaced(value: Any, key: str = "") -> Iterator[str]:
    """Replace local paths inside ``value``, an object or a list, by their last names; yields their keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in list(items):
        inner = f"{key}.{name}" if key else str(name)
        if TEXT_KEYS.fullmatch(str(name)):
            continue
        if isinstance(part, str) and LOCAL_PATH.fullmatch(part):
            value[name] = PureWindowsPath(part).name
            yield inner
        yield from _replaced(part, inner)


def _check_card(path: Path) -> None:
    """Raise InputError if the metadata of a card cannot be read: the Hub would say so after everything was sent."""
    from huggingface_hub import ModelCard

    try:
        ModelCard.load(path)
    except Exception as error:  # of YAML, of types, of encodings
        reason = " ".join(str(error).split())
        raise InputError(f"{path} has metadata that cannot be read: {reason}; correct the part between ---") from None


def _holds_settings(name: str) -> bool:
    return name.endswith(".json") and not any(fnmatch(Path(name).name, pattern) for pattern in TEXT_FILES)


def _is_large(name: str, size: int) -> bool:
    return size > LARGE_BYTES or any(fnmatch(Path(name).name, pattern) for pattern in LARGE_NAMES)
