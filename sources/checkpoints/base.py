"""Reads the base model of a merge: a stock checkpoint into whose configuration 2D RoPE can be baked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pos2d.config_values import shown
from pos2d.errors import InputError
from pos2d.families import CLASS_NAMES, MODEL_TYPE_PREFIX
from pos2d.manifest import FILE_NAME, is_artifact
from pos2d.sources.checkpoints import minimind
from pos2d.sources.checkpoints.checkpoint import EMBEDDING, HEAD, Checkpoint, read_checkpoint, read_config
from pos2d.sources.checkpoints.location import locate
from pos2d.sources.checkpoints.other_keys import other_keys
from pos2d.sources.checkpoints.quantised import refuse_quantised_config
from pos2d.sources.checkpoints.rope import rope_settings
from pos2d.sources.checkpoints.weight_files import CONFIG
from pos2d.sources.files.tensor_io import opened, sha256_of

ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters", "rotary_emb_base", "rotary_dim", "rotary_pct"}
# transformers reads the base of such a directory, and not the weights in it.
ADAPTER = "adapter_config.json"


def read_base(base_model: str | Path, *, revision: str | None = None, bake_rope: bool = True) -> Checkpoint:
    """Read a stock checkpoint from a directory, or from the Hub at ``revision``: a commit, tag or branch.

    Raises:
        UsageError: a revision of a local directory.
        InputError: not a checkpoint, an unknown architecture, no rotary embedding, a rope type that changes with the
            length, a quantised or an already merged base, or tensors that do not fit the configuration, such as a head
            that differs from the embedding it is tied to.
        UnsafeInputError: an index that names files outside the directory, or weights that would run code.
    """
    directory, commit = locate(str(base_model), revision)
    config = read_config(directory)
    model_type = str(config["model_type"])
    name = shown(model_type).strip("'")
    source = str(directory / CONFIG)
    if model_type.startswith(MODEL_TYPE_PREFIX):
        if not is_artifact(directory):
            raise InputError(f"{directory} was made by this tool but has no {FILE_NAME}; copy the artifact again")
        raise InputError(f"{source}: this base is merged already ({name}); merge into the original base instead")
    if model_type == minimind.MODEL_TYPE:
        raise InputError(f"{source}: {minimind.describe_minimind_config(config)}")
    if model_type not in CLASS_NAMES:
        text_config = config.get("text_config")
        inner = text_config.get("model_type") if isinstance(text_config, dict) else None
        if isinstance(inner, str) and inner in CLASS_NAMES:
            raise InputError(
                f"{source}: {name} holds a {inner} among other models (text_config); save its "
                "language model alone, and give that directory"
            )
        if bake_rope and not ROPE_KEYS & set(config):
            raise InputError(f"{source}: {name} has no rotary position embedding, so 2D RoPE cannot be baked into it")
        raise InputError(f"{source}: unknown architecture {name!r}; supported are {', '.join(CLASS_NAMES)}")
    refuse_quantised_config(config, source)
    _refuse_other_models(directory, config)
    rope_settings(config, source)
    base = read_checkpoint(directory, config, commit)
    other_keys(config, source, base.sizes.vocab)
    _check_redundant_head(base)
    return base


def _refuse_other_models(directory: Path, config: Mapping[str, Any]) -> None:
    """Refuse a directory from which transformers would load something else than the model of ``config``."""
    if (directory / ADAPTER).is_file():
        raise InputError(
            f"{directory} holds a model and {ADAPTER}, by which transformers loads another base with that adapter; "
            "move one of the two to a directory of its own"
        )
    if config.get("text_config") is not None:
        raise InputError(
            f"{directory / CONFIG}: text_config and the keys beside it describe two models; keep one of them"
        )


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
