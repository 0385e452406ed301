"""Which files of a model directory hold its weights: those that transformers loads, in 4.57 and 5 alike."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pos2d.config_values import ConfigValues
from pos2d.errors import InputError, UnsafeInputError
from pos2d.sources.files.json_object import read_json_object
from pos2d.sources.files.links import refuse_broken_link

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD_SINGLE, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# A key of config.json that names the file to load.
EXPLICIT = "transformers_weights"
INDEX_ENDING = ".safetensors.index.json"
CURE = "copy the directory again"
# Other files of weights, and what to do if a directory has no more than them.
OTHER_WEIGHTS = {
    "model-*-of-*.safetensors": f"is one of several files, and {INDEX}, which names them, is missing; copy it too",
    "pytorch_model-*-of-*.bin": f"is one of several files, and {OLD_INDEX}, which names them, is missing; copy it too",
    "global_step*": "has shards of DeepSpeed; gather them with its zero_to_fp32.py, or save the model again",
    "pytorch_model_fsdp*": "has shards of FSDP; merge them with `accelerate merge-weights`, or save the model again",
    "*.distcp": "is a shard of FSDP; merge the shards with `accelerate merge-weights`, or save the model again",
    "consolidated*": "is in the format of the model's authors; download the weights in Hugging Face's format",
    "model.*.safetensors": f"is a variant, which is loaded by its name only; rename it to {SINGLE} to use it",
    "*.gguf": "cannot be read as a base; give the Hugging Face model directory from which it was converted",
    "*.safetensors": f"does not have the name of a model's weights; rename it to {SINGLE} if it is the whole model",
}


def weight_files(directory: Path, config: Mapping[str, Any]) -> list[str]:
    """The names of the files: safetensors before pickles, and one whole file before an index.

    Raises:
        InputError: no weights, an index that cannot be read, or a link to a file that is missing.
        UnsafeInputError: a file outside the directory.
    """
    explicit = explicit_file(directory, config)
    if explicit is not None:
        return files_of_index(directory / explicit) if explicit.endswith(INDEX_ENDING) else [explicit]
    for single, index in ((SINGLE, INDEX), (OLD_SINGLE, OLD_INDEX)):
        refuse_broken_link(directory / single)
        if (directory / single).is_file():
            return [single]
        refuse_broken_link(directory / index)
        if (directory / index).is_file():
            return files_of_index(directory / index)
    raise InputError(f"{directory} has no {SINGLE}, {INDEX}, {OLD_SINGLE} or {OLD_INDEX}; {_cure(directory)}")


def _cure(directory: Path) -> str:
    """What to do about a model without weights, by the other files in its directory."""
    for pattern, cure in OTHER_WEIGHTS.items():
        found = sorted(path.name for path in directory.glob(pattern))
        if found:
            return f"{found[0]} {cure}"
    return "give a directory with weights"


def files_of_index(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
        InputError: it cannot be read, or names a file of another kind.
        UnsafeInputError: it names a file outside its directory.
    """
    places = ConfigValues(read_json_object(index, CURE), str(index)).block("weight_map").values
    ending = ".bin" if index.name == OLD_INDEX else ".safetensors"
    files = sorted({str(file) for file in places.values()})
    for file in files:
        if Path(file).name != file:
            raise UnsafeInputError(f"{index} names {file!r}, which is outside its directory; do not trust it")
        if not file.endswith(ending):
            raise InputError(f"{index} names {file!r}, which is not a {ending} file; {CURE}")
    if not files:
        raise InputError(f"{index} names no files in weight_map; {CURE}")
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
