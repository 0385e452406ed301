"""Reads where every tensor of a model directory is, and checks names, shapes and dtypes, before any weight is read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pos2d.config_values import ConfigValues
from pos2d.dtypes import FLOAT_TYPES
from pos2d.errors import InputError
from pos2d.families import Dimensions, expected_tensors
from pos2d.git_lfs import refuse_pointer
from pos2d.sources.checkpoints.quantised import refuse_quantised_tensors
from pos2d.sources.checkpoints.weight_files import CONFIG, weight_files
from pos2d.sources.files.json_object import read_json_object
from pos2d.sources.files.pth import check_storage, read_pth
from pos2d.sources.files.tensor_places import TensorPlace, safetensors_name

EMBED_TOKENS, LM_HEAD = "model.embed_tokens", "lm_head"
EMBEDDING, HEAD = f"{EMBED_TOKENS}.weight", f"{LM_HEAD}.weight"
# A header has about a hundred bytes for each tensor.
MAX_HEADER_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory with a configuration and weights; every expected tensor exists and has the right shape.

    ``revision`` is the commit of a checkpoint that came from the Hub. ``redundant_head``: the place of a head that is
    stored although the configuration ties it to the embedding.
    """

    directory: Path
    config: Mapping[str, Any]
    sizes: Dimensions
    tensors: Mapping[str, TensorPlace]
    revision: str | None = None
    redundant_head: TensorPlace | None = None

    @property
    def files(self) -> list[str]:
        return sorted({place.file for place in self.tensors.values()})

    def stamps(self) -> dict[str, list[int]]:
        """Size and modification time of the files, by which it is recognised whether they are unchanged."""
        stats = {file: (self.directory / file).stat() for file in self.files}
        return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}

    def linear_shapes(self) -> dict[str, tuple[int, ...]]:
        """Module name to ``(out, in)`` of every linear layer, including a tied head."""
        shapes = {
            name.removesuffix(".weight"): place.shape
            for name, place in self.tensors.items()
            if name.endswith("_proj.weight") or name == HEAD
        }
        return shapes | ({LM_HEAD: self.tensors[EMBEDDING].shape} if self.sizes.tied else {})


def read_checkpoint(directory: Path, config: Mapping[str, Any], revision: str | None = None) -> Checkpoint:
    """Read the places of a directory's tensors and check them against the sizes in ``config``.

    Raises:
        InputError: no or damaged weights, a type that is not floating point, or tensors that do not fit ``config``.
        UnsafeInputError: an index that names files outside the directory, or a ``.bin`` that would run code.
    """
    sizes = Dimensions.from_config(config, str(directory / CONFIG))
    expected = expected_tensors(sizes)
    # Loaders ignore stored frequencies too and compute them from the configuration.
    tensors = {
        name: place for name, place in _scan(directory, config).items() if not name.endswith("rotary_emb.inv_freq")
    }
    redundant_head = tensors.pop(HEAD, None) if sizes.tied else None
    missing = sorted(set(expected) - set(tensors))
    unknown = sorted(set(tensors) - set(expected))
    known = {name: place for name, place in tensors.items() if name in expected}
    wrong = [f"{n} {place.shape} instead of {expected[n]}" for n, place in known.items() if place.shape != expected[n]]
    types = [f"{name} {place.dtype}" for name, place in known.items() if place.dtype not in FLOAT_TYPES]
    faults = [
        f"{label} {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"
        for label, names in (
            ("missing tensors", missing),
            ("unknown tensors", unknown),
            ("wrong shapes", wrong),
            ("types that are not floating point", types),
        )
        if names
    ]
    if faults:
        refuse_quantised_tensors(directory, tensors)
        _refuse_empty(directory, known)
        raise InputError(f"{directory}: the weights do not fit config.json: {'; '.join(faults)}")
    return Checkpoint(directory, config, sizes, tensors, revision, redundant_head)


def read_config(directory: Path) -> dict[str, Any]:
    """Read ``config.json`` of a model directory; raises InputError if it is missing or has no ``model_type``."""
    path = directory / CONFIG
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a Hugging Face model directory")
    config = read_json_object(path, "copy the model again")
    if "model_type" not in config:
        raise InputError(f"{path} has no model_type; give a Hugging Face model directory")
    ConfigValues(config, str(path)).text("model_type")
    return config


def _refuse_empty(directory: Path, tensors: Mapping[str, TensorPlace]) -> None:
    empty = sorted(name for name, place in tensors.items() if place.elements == 0)
    if empty:
        raise InputError(
            f"{directory}: {len(empty)} tensors are empty, such as {empty[0]}: DeepSpeed ZeRO-3 saved the model "
            "without gathering it; save it with stage3_gather_16bit_weights_on_model_save, or convert the checkpoint "
            "with DeepSpeed's zero_to_fp32.py"
        )


def _scan(directory: Path, config: Mapping[str, Any]) -> dict[str, TensorPlace]:
    tensors: dict[str, TensorPlace] = {}
    for file in weight_files(directory, config):
        of_file = _scan_safetensors(directory, file) if file.endswith(".safetensors") else _scan_pth(directory, file)
        repeated = sorted(set(of_file) & set(tensors))
        if repeated:
            raise InputError(f"{directory / file}: tensor {repeated[0]} is in {tensors[repeated[0]].file} as well")
        tensors |= of_file
    return tensors


def _scan_safetensors(directory: Path, file: str) -> dict[str, TensorPlace]:
    path = directory / file
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file; copy the model again")
    refuse_pointer(path)
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise InputError(f"{path} has a header of more than {MAX_HEADER_BYTES >> 20} MiB; copy the model again")
            text = stream.read(length)
        with safe_open(path, framework="np"):
            header = json.loads(text)  # the library has checked it: lengths, overlaps, gaps
    except (SafetensorError, OSError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}; copy the model again") from None
    header.pop("__metadata__", None)
    return {
        name: TensorPlace(file, tuple(facts["shape"]), facts["dtype"], 8 + length + facts["data_offsets"][0])
        for name, facts in header.items()
    }


def _scan_pth(directory: Path, file: str) -> dict[str, TensorPlace]:
    if not (directory / file).is_file():
        raise InputError(f"{directory / file} does not exist; copy the model again")
    tensors = read_pth(directory / file)
    check_storage(tensors, directory / file)
    return {
        name: TensorPlace(file, tuple(tensor.shape), safetensors_name(str(tensor.dtype)))
        for name, tensor in tensors.items()
    }
