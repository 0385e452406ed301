"""Which files of a model directory hold its weights: those that transformers loads, in 4.57 and 5 alike."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pos2d.config_values import ConfigValues
from pos2d.errors import InputError, UnsafeInputError
from pos2d.exporter.files.json_object import read_json_object

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD_SINGLE, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# A key of config.json that names the file to load.
EXPLICIT = "transformers_weights"
INDEX_ENDING = ".safetensors.index.json"


def weight_files(directory: Path, config: Mapping[str, Any]) -> list[str]:
    """The names of the files: safetensors before pickles, and one whole file before an index.

    Raises:
        InputError: no weights, or an index that cannot be read.
        UnsafeInputError: a file outside the directory.
    """
    explicit = explicit_file(directory, config)
    if explicit is not None:
        return files_of_index(directory / explicit) if explicit.endswith(INDEX_ENDING) else [explicit]
    for single, index in ((SINGLE, INDEX), (OLD_SINGLE, OLD_INDEX)):
        if (directory / single).is_file():
            return [single]
        if (directory / index).is_file():
            return files_of_index(directory / index)
    gguf = "; its GGUF file cannot be read as a base" if any(directory.glob("*.gguf")) else ""
    raise InputError(
        f"{directory} has no {SINGLE}, {INDEX}, {OLD_SINGLE} or {OLD_INDEX}{gguf}; give a directory with weights"
    )


def files_of_index(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
        InputError: it cannot be read, or names a file of another kind.
        UnsafeInputError: it names a file outside its directory.
    """
    places = ConfigValues(read_json_object(index, "copy the model again"), str(index)).block("weight_map").values
    ending = ".bin" if index.name == OLD_INDEX else ".safetensors"
    files = sorted({str(file) for file in places.values()})
    for file in files:
        if Path(file).name != file:
            raise UnsafeInputError(f"{index} names {file!r}, which is outside its directory; do not trust this model")
        if not file.endswith(ending):
            raise InputError(f"{index} names {file!r}, which is not a {ending} file; copy the model again")
    if not files:
        raise InputError(f"{index} names no files in weight_map; copy the model again")
    return files


def explicit_file(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The file of weights, or the index of such, that the configuration names; None if it names none.

    Raises:
        InputError: another kind of file.
        UnsafeInputError: a file outside the directory.
    """
    source = str(directory / CONFIG)
    name: str | None = ConfigValues(config, source).text(EXPLICIT, None)
    if name is None:
        return None
    if Path(name).name != name:
        raise UnsafeInputError(f"{source}: {EXPLICIT} {name!r} is outside its directory; do not trust this model")
    if not name.endswith((".safetensors", INDEX_ENDING)):
        raise InputError(f"{source}: {EXPLICIT} {name!r} is not a safetensors file or an index of such; correct it")
    return name
