"""Reads the base model of a merge: a stock checkpoint into whose configuration 2D RoPE can be baked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pos2d.errors import InputError, UsageError
from pos2d.exporter.files.tensor_io import opened, sha256_of
from pos2d.exporter.inputs.checkpoint import (
    EMBEDDING,
    HEAD,
    OLD_INDEX,
    OLD_SINGLE,
    Checkpoint,
    read_checkpoint,
    read_config,
)
from pos2d.families import CLASS_NAMES, MODEL_TYPE_PREFIX

ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters", "rotary_emb_base", "rotary_dim", "rotary_pct"}
BAKED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
HUB_PICKLES = [OLD_SINGLE, OLD_INDEX, "pytorch_model-*.bin"]


def read_base(base_model: str | Path, *, revision: str | None = None, bake_rope: bool = True) -> Checkpoint:
    """Read a stock checkpoint from a directory, or from the Hub at ``revision``: a commit, tag or branch.

    Raises:
        UsageError: a revision of a local directory.
        InputError: not a checkpoint, an unknown architecture, no rotary embedding, a rope type that changes with the
            length, a quantised or an already merged base, or tensors that do not fit the configuration, such as a head
            that differs from the embedding it is tied to.
        UnsafeInputError: an index that names files outside the directory, or weights that would run code.
    """
    directory, commit = _resolve(str(base_model), revision)
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
    base = read_checkpoint(directory, config, commit)
    _check_redundant_head(base)
    return base


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Theta, type and scaling in one flat dictionary, from a configuration of transformers 4 or 5."""
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


def _check_redundant_head(base: Checkpoint) -> None:
    """Refuse a stored head that differs from the embedding to which the configuration ties it.

    Releases of transformers do not agree on which of the two such a model uses.
    """
    head, embedding = base.redundant_head, base.tensors.get(EMBEDDING)
    if head is None or embedding is None:
        return
    with opened(base.directory, {head.file, embedding.file}) as files:
        same = head.dtype == embedding.dtype and (
            sha256_of(files[head.file], HEAD, head) == sha256_of(files[embedding.file], EMBEDDING, embedding)
        )
    if not same:
        raise InputError(
            f"{base.directory}: {HEAD} differs from {EMBEDDING}, which config.json ties it to; set tie_word_embeddings "
            "to false there to keep both, or remove the head"
        )


def _resolve(base_model: str, revision: str | None) -> tuple[Path, str | None]:
    """The local directory of a base, and its commit if it came from the Hub."""
    if Path(base_model).is_dir():
        if revision is not None:
            raise UsageError(f"`revision` is for a Hub id; {base_model} is a directory")
        return Path(base_model), None
    looks_like_path = base_model.startswith((".", "/", "~")) or base_model.count("/") > 1
    if looks_like_path or Path(base_model).exists():
        raise InputError(f"base model {base_model} is not a directory; give a Hugging Face model directory or a Hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError

    try:
        path = Path(snapshot_download(base_model, revision=revision, allow_patterns=HUB_FILES))
        if not list(path.glob("*.safetensors")):
            path = Path(snapshot_download(base_model, revision=revision, allow_patterns=HUB_FILES + HUB_PICKLES))
    except RevisionNotFoundError:
        raise InputError(
            f"base model {base_model} has no revision {revision!r}; give a commit, tag or branch"
        ) from None
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"base model {base_model} is neither a directory nor a model that can be downloaded from the Hub: {reason}"
        ) from None
    return path, path.name
