"""Files next to the weights: tokenizer, chat template, generation settings, and the model's code."""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pos2d import hf
from pos2d.git_lfs import refuse_pointer
from pos2d.hashing import sha256
from pos2d.sources.files.json_object import read_json_object, write_json
from pos2d.sources.files.links import refuse_broken_link
from pos2d.sources.sidecars.tokenizer_settings import readable_settings, settings_of_class

TOKENIZER, TOKENIZER_SETTINGS = "tokenizer.json", "tokenizer_config.json"
GENERATION_SETTINGS, SPECIAL_TOKENS = "generation_config.json", "special_tokens_map.json"
# Patterns of the files that hold a vocabulary; each of the first kind is a tokenizer by itself.
VOCABULARIES = (
    TOKENIZER,
    "vocab.json",
    "vocab.txt",
    "tokenizer.model*",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
    "tiktoken.model",
)
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
TOKENIZER_FILES = (
    *VOCABULARIES,
    "merges.txt",
    TOKENIZER_SETTINGS,
    SPECIAL_TOKENS,
    "added_tokens.json",
    *TEMPLATES,
)
# Settings that are read, and not only copied.
SETTINGS = (TOKENIZER_SETTINGS, GENERATION_SETTINGS, SPECIAL_TOKENS)
CODE = ("configuration_pos2d.py", "modeling_pos2d.py")

# The files next to the weights: the name in the artifact, and where the file is now.
Files = Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class Sidecars:
    """What travels next to the weights.

    ``tokenizer_of``: whose tokenizer it is, ``base`` or the name of an adapter or directory. ``converted``: the content
    of the tokenizer.json that the files lack. ``settings``: values for the tokenizer's settings that those lack.
    ``end_tokens``: the end tokens that generation settings are to have; None leaves them.
    """

    files: Files
    tokenizer_of: str = "base"
    converted: str | None = None
    settings: Mapping[str, Any] | None = None
    end_tokens: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """What a manifest records: whose tokenizer it is, and a hash over all files and what is changed in them."""
        hashes = "".join(f"{name} {sha256(path)}\n" for name, path in sorted(self.files.items()))
        changes = f"{self.converted} {self.end_tokens}"
        return {"of": self.tokenizer_of, "sha256": hashlib.sha256(f"{hashes}{changes}".encode()).hexdigest()}


def files_in(directory: Path, patterns: Sequence[str] = (GENERATION_SETTINGS, *TOKENIZER_FILES)) -> dict[str, Path]:
    """The files of a directory that travel with an artifact, by name; the other patterns choose some of them.

    Raises:
        InputError: one of them is a link to a file that is missing.
    """
    for pattern in patterns:
        refuse_broken_link(directory / pattern)  # a glob leaves them out where the pattern is a name
    found = (path for pattern in patterns for path in sorted(directory.glob(pattern)) if path.is_file())
    return {path.relative_to(directory).as_posix(): path for path in found}


def read_settings(path: Path) -> dict[str, Any]:
    """Read a settings file of a model; raises InputError if it is not a JSON object."""
    return read_json_object(path, "copy the model again")


def check_sidecars(files: Files) -> None:
    """Check, before anything is written, that :func:`write_sidecars` will be able to read ``files``.

    Raises:
        InputError: a settings file is not a JSON object, or a file is a Git LFS pointer.
    """
    for path in files.values():
        refuse_pointer(path)
    for name in SETTINGS:
        if name in files:
            read_settings(files[name])


def write_sidecars(sidecars: Sidecars, target: Path, family: str) -> None:
    """Write the files of a model of ``family`` into ``target``, in a form that transformers 4.57 and 5 read alike."""
    for name, path in sidecars.files.items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)
    if sidecars.converted is not None:
        (target / TOKENIZER).write_text(sidecars.converted, encoding="utf-8")
    whole = (target / TOKENIZER).is_file()
    for name in (TOKENIZER_SETTINGS, SPECIAL_TOKENS):
        path = target / name
        found = read_settings(path) if path.is_file() else {}
        more = dict(sidecars.settings or {}) if name == TOKENIZER_SETTINGS else {}
        readable = readable_settings(more | found, whole=whole and name == TOKENIZER_SETTINGS)
        if whole and name == TOKENIZER_SETTINGS:
            readable |= settings_of_class(readable, target / TOKENIZER, family)
        if readable != found and (path.is_file() or name == TOKENIZER_SETTINGS):
            write_json(path, readable)
    path = target / GENERATION_SETTINGS
    if sidecars.end_tokens is not None and path.is_file():
        write_json(path, read_settings(path) | {"eos_token_id": list(sidecars.end_tokens)})


def copy_code(target: Path) -> None:
    """Copy the Python files with which plain transformers loads a torch artifact."""
    for name in CODE:
        shutil.copyfile(Path(hf.__file__).parent / name, target / name)
