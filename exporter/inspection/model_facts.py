"""Facts about a base checkpoint or an artifact, from its configuration, headers and manifest."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pos2d.exporter.inspection.known_bases import KINDS
from pos2d.manifest import read_manifest
from pos2d.onnx_io import GraphInfo
from pos2d.sources.adapters.adapter import module_kind
from pos2d.sources.checkpoints.checkpoint import Checkpoint
from pos2d.sources.checkpoints.rope import rope_settings
from pos2d.sources.checkpoints.weight_files import CONFIG
from pos2d.sources.files.tensor_places import torch_name
from pos2d.sources.hf_config import end_tokens


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """One base model: its dimensions, ``bytes`` of all weight files, and number of tensors by dtype.

    ``rope`` has the rope type, theta and scaling settings. ``trainer_covers``: the kinds of linear layers that the
    trainer's LoRA adapts, which are the square ones.
    """

    family: str
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]
    shards: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context_length: int
    tied: bool
    rope: Mapping[str, Any]
    eos_token_ids: tuple[int, ...]
    trainer_covers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ArtifactFacts:
    """One artifact, as its manifest describes it; ``bytes`` of all files. ``totals`` and ``parity`` can be missing.

    ``one_branch_of``: the 2D RoPE of the model of which the artifact has one branch, or None.
    """

    kind: str
    family: str
    dtype: str
    quant: Mapping[str, Any] | None
    rope_2d: Mapping[str, Any]
    one_branch_of: Mapping[str, Any] | None
    base: Mapping[str, Any]
    adapters: tuple[Mapping[str, Any], ...]
    vocab: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    files: Mapping[str, int]
    bytes: int
    totals: Mapping[str, Any] | None
    parity: Mapping[str, Any] | None
    graph: GraphInfo | None
    tool_version: str


def base_facts(base: Checkpoint) -> BaseFacts:
    """Describe a base model."""
    sizes = base.sizes
    dtypes = [torch_name(place.dtype) for place in base.tensors.values()]
    square = [module_kind(module) for module, shape in base.linear_shapes().items() if shape[0] == shape[1]]
    return BaseFacts(
        family=sizes.family,
        parameters=sum(prod(place.shape) for place in base.tensors.values()),
        bytes=sum((base.directory / file).stat().st_size for file in base.files),
        dtypes={dtype: dtypes.count(dtype) for dtype in sorted(set(dtypes))},
        shards=len(base.files),
        layers=sizes.layers,
        hidden=sizes.hidden,
        intermediate=sizes.intermediate,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        vocab=sizes.vocab,
        context_length=sizes.context_length,
        tied=sizes.tied,
        rope=rope_settings(base.config, str(base.directory / CONFIG)),
        eos_token_ids=end_tokens(base),
        trainer_covers=tuple(name for name in KINDS if name in square),
    )


def artifact_facts(directory: Path) -> ArtifactFacts:
    """Describe the artifact in ``directory``.

    Raises:
        InputError: a manifest that cannot be read, or files that differ from it.
    """
    manifest = read_manifest(directory)
    block = manifest.to_dict()
    return ArtifactFacts(
        kind=manifest.kind,
        family=manifest.family,
        dtype=manifest.dtype,
        quant=block["quant"],
        rope_2d=block["rope_2d"],
        one_branch_of=block["one_branch_of"],
        base=manifest.base,
        adapters=manifest.adapters,
        vocab=manifest.vocab_size,
        context_length=manifest.context_length,
        eos_token_ids=tuple(manifest.eos_token_ids),
        files={name: facts["bytes"] for name, facts in manifest.files.items()},
        bytes=manifest.total_bytes,
        totals=(manifest.ledger or {}).get("totals"),
        parity=manifest.parity,
        graph=manifest.graph,
        tool_version=manifest.tool_version,
    )
