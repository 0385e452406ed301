"""Files next to the weights: tokenizer, chat template, generation settings, and the model's code."""

import shutil
from pathlib import Path
from typing import Any

from pos2d import hf
from pos2d.exporter.artifact.staging import write_json
from pos2d.exporter.files.git_lfs import refuse_pointer
from pos2d.exporter.files.json_object import read_json_object

SIDECARS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
CODE = ("configuration_pos2d.py", "modeling_pos2d.py")
TOKENIZER_SETTINGS, GENERATION_SETTINGS = "tokenizer_config.json", "generation_config.json"
# transformers 5 writes the first name for the class that both 4.57 and 5 know by the second.
NEW_TOKENIZER_CLASS, TOKENIZER_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"


def read_settings(path: Path) -> dict[str, Any]:
    """Read a settings file of a model; raises InputError if it is not a JSON object."""
    return read_json_object(path, "copy the model again")


def check_sidecars(source: Path) -> None:
    """Check, before anything is written, that :func:`copy_sidecars` will be able to read ``source``.

    Raises:
        InputError: a settings file is not a JSON object, or a file is a Git LFS pointer.
    """
    for name in SIDECARS:
        refuse_pointer(source / name)
    for name in (TOKENIZER_SETTINGS, GENERATION_SETTINGS):
        if (source / name).is_file():
            read_settings(source / name)


def copy_sidecars(source: Path, target: Path) -> None:
    """Copy those of :data:`SIDECARS` that ``source`` has, in a form that transformers 4.57 reads as well."""
    for name in SIDECARS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    path = target / TOKENIZER_SETTINGS
    if path.is_file():
        settings = read_settings(path)
        if settings.get("tokenizer_class") == NEW_TOKENIZER_CLASS:
            write_json(path, settings | {"tokenizer_class": TOKENIZER_CLASS})


def copy_code(target: Path) -> None:
    """Copy the Python files with which plain transformers loads a torch artifact."""
    for name in CODE:
        shutil.copyfile(Path(hf.__file__).parent / name, target / name)
