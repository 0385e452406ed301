"""The base model: its configuration checked, its tensors known by name, shape and file before any is read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pos2d.errors import InputError, UnsafeInputError
from pos2d.families import CLASS_NAMES, MODEL_TYPE_PREFIX, Dimensions, expected_tensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters", "rotary_emb_base", "rotary_dim", "rotary_pct"}
BAKED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor lies: its file in the checkpoint, its shape and its safetensors type name."""

    file: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory with a configuration and safetensors, every expected tensor present and of the right shape."""

    directory: Path
    config: Mapping[str, Any]
    sizes: Dimensions
    tensors: Mapping[str, TensorPlace]

    @property
    def files(self) -> list[str]:
        return sorted({place.file for place in self.tensors.values()})

    def linear_shapes(self) -> dict[str, tuple[int, ...]]:
        """Module name to ``(out, in)`` of every linear layer."""
        return {
            name.removesuffix(".weight"): place.shape
            for name, place in self.tensors.items()
            if name.endswith("_proj.weight") or name == "lm_head.weight"
        }


def read_base(base_model: str, *, bake_rope: bool = True) -> Checkpoint:
    """A stock checkpoint, from a directory or a Hub id.

    Raises:
        InputError: not a checkpoint, an unknown architecture, no rotary embedding, a rope type that changes with the
            length, a quantised or an already merged base, or tensors that do not fit the configuration.
        UnsafeInputError: an index that names files outside the directory.
    """
    directory = _resolve(base_model)
    config = read_config(directory)
    model_type = str(config.get("model_type"))
    source = str(directory / "config.json")
    if model_type.startswith(MODEL_TYPE_PREFIX):
        raise InputError(f"{source}: this base is merged already ({model_type}); merge into the original base instead")
    if model_type not in CLASS_NAMES:
        if bake_rope and not ROPE_KEYS & set(config):
            raise InputError(
                f"{source}: {model_type} has no rotary position embedding, so 2D RoPE cannot be baked into it"
            )
        raise InputError(f"{source}: unknown architecture {model_type!r}; supported are {', '.join(CLASS_NAMES)}")
    if "quantization_config" in config:
        raise InputError(f"{source}: the base is quantised; merge into the unquantised base, then quantise the result")
    _check_rope(config, source)
    return read_checkpoint(directory, config)


def read_checkpoint(directory: Path, config: Mapping[str, Any]) -> Checkpoint:
    """The tensors of a directory, checked against the sizes that ``config`` gives; raises as :func:`read_base`."""
    sizes = Dimensions.from_config(config, str(directory / "config.json"))
    expected = expected_tensors(sizes)
    # Loaders ignore these two as well: frequencies come from the configuration, a tied head from the embedding.
    ignored = ("rotary_emb.inv_freq", "lm_head.weight") if sizes.tied else ("rotary_emb.inv_freq",)
    tensors = {name: place for name, place in _scan(directory).items() if not name.endswith(ignored)}
    missing = sorted(set(expected) - set(tensors))
    unknown = sorted(set(tensors) - set(expected))
    wrong = [
        f"{n} {tensors[n].shape} instead of {s}" for n, s in expected.items() if n in tensors and tensors[n].shape != s
    ]
    faults = [
        f"{label} {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"
        for label, names in (("missing tensors", missing), ("unknown tensors", unknown), ("wrong shapes", wrong))
        if names
    ]
    if faults:
        raise InputError(f"{directory}: the weights do not fit config.json: {'; '.join(faults)}")
    return Checkpoint(directory, config, sizes, tensors)


def read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give a Hugging Face model directory") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"{path} has no model_type; give a Hugging Face model directory")
    return config


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Theta, type and scaling of either generation of configurations, in one flat dictionary."""
    settings: dict[str, Any] = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    for key in ("rope_scaling", "rope_parameters"):
        block = dict(config.get(key) or {})
        if "type" in block:
            block.setdefault("rope_type", block.pop("type"))
        settings |= block
    return settings


def _check_rope(config: Mapping[str, Any], source: str) -> None:
    settings = rope_settings(config)
    if settings["rope_type"] not in BAKED_ROPE_TYPES:
        raise InputError(
            f"{source}: rope type {settings['rope_type']!r} changes with the length and cannot be baked; "
            f"supported are {', '.join(BAKED_ROPE_TYPES)}"
        )
    if config.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0)) != 1.0:
        raise InputError(f"{source}: partial_rotary_factor is not supported; all of a head must be rotary")


def _resolve(base_model: str) -> Path:
    if Path(base_model).is_dir():
        return Path(base_model)
    looks_like_path = base_model.startswith((".", "/", "~")) or base_model.count("/") > 1
    if looks_like_path or Path(base_model).exists():
        raise InputError(f"base model {base_model} is not a directory; give a Hugging Face model directory or a Hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base_model, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"base model {base_model} is neither a directory nor a model that the Hub gives: {reason}"
        ) from None


def _scan(directory: Path) -> dict[str, TensorPlace]:
    tensors: dict[str, TensorPlace] = {}
    for file in _shards(directory):
        try:
            with safe_open(directory / file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - not a mapping
                    piece = shard.get_slice(name)
                    tensors[name] = TensorPlace(file, tuple(piece.get_shape()), piece.get_dtype())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{directory / file} cannot be read: {error}") from None
    return tensors


def _shards(directory: Path) -> list[str]:
    index = directory / INDEX
    if not index.is_file():
        if not (directory / SINGLE).is_file():
            raise InputError(f"{directory} has no {SINGLE} and no {INDEX}; only safetensors checkpoints are read")
        return [SINGLE]
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} cannot be read: {error!r}") from None
    for file in files:
        if Path(file).name != file:
            raise UnsafeInputError(
                f"{index} names {file!r}, which is not a file of its own directory; do not trust this model"
            )
    return files
