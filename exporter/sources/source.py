"""What weights are made from: a base with its adapters, or a directory that was merged before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pos2d import __version__
from pos2d.errors import InputError, UsageError
from pos2d.exporter.adapters import Adapter, read_adapters
from pos2d.exporter.artifact.hf_config import end_tokens
from pos2d.exporter.artifact.sidecars import check_companions
from pos2d.exporter.artifact.staging import sha256
from pos2d.exporter.inputs.base import read_base
from pos2d.exporter.inputs.checkpoint import Checkpoint, read_checkpoint, read_config
from pos2d.manifest import read_manifest
from pos2d.spec import Align, Rope2DSpec, pair_indices_for_ratio, parse_pair_indices

DEFAULT_RATIO = 0.5


@dataclass(frozen=True, slots=True)
class TrainedPositions:
    """The positions of the training as the flags name them; the first three exclude one another.

    Raises:
        UsageError: more than one of the three.
    """

    rope_2d_ratio: float | None = None
    pair_indices: str | Sequence[int] | None = None
    no_patch_rope: bool = False
    branch_stride: int = 128
    align_to: Align = "left"

    def __post_init__(self) -> None:
        if sum((self.rope_2d_ratio is not None, self.pair_indices is not None, self.no_patch_rope)) > 1:
            raise UsageError(
                "--rope-2d-ratio, --pair-indices and --no-patch-rope exclude one another; give one of them"
            )

    @property
    def warnings(self) -> list[str]:
        """What was taken because nobody said it."""
        if (self.rope_2d_ratio, self.pair_indices, self.no_patch_rope) != (None, None, False):
            return []
        return [
            f"no positions were named, so --rope-2d-ratio {DEFAULT_RATIO} was taken, the trainer's default; with "
            "another than the training's several branches are nonsense (inspect --guess-ratio finds it)"
        ]

    def resolve(self, frequencies: int) -> Rope2DSpec:
        """The contract for a base with so many ``frequencies``; a ratio of 0.5 when nothing is said."""
        if self.no_patch_rope:
            return Rope2DSpec(frequencies, (), self.branch_stride, self.align_to, visibility="isolated")
        if self.pair_indices is not None:
            indices = parse_pair_indices(self.pair_indices)
        else:
            ratio = DEFAULT_RATIO if self.rope_2d_ratio is None else self.rope_2d_ratio
            indices = pair_indices_for_ratio(frequencies, ratio)
        return Rope2DSpec(frequencies, indices, self.branch_stride, self.align_to)


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Weights, what is added to them, and how they are positioned; ``origin`` is what a manifest says of all that.

    ``options``: how weights that were merged before were summed and rounded; ``retention``: how much of their adapters
    that rounding kept, where it was noted; ``warnings``: what was taken because nobody said it.
    """

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    spec: Rope2DSpec
    eos_token_ids: tuple[int, ...]
    origin: dict[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    retention: float | None = None
    warnings: tuple[str, ...] = ()


def from_adapters(
    base_model: str | Path,
    lora: str | Path | Sequence[str | Path],
    positions: TrainedPositions,
    *,
    revision: str | None = None,
    lora_rank: int | None = None,
) -> Source:
    """A base and the adapters that were trained on it.

    Raises:
        UsageError, InputError, UnsafeInputError: see :func:`pos2d.exporter.inputs.base.read_base` and
            :func:`pos2d.exporter.adapters.read_adapters`.
    """
    base = read_base(base_model, revision=revision, bake_rope=not positions.no_patch_rope)
    check_companions(base.directory)
    spec = positions.resolve(base.sizes.num_frequencies)
    adapters = tuple(read_adapters([lora] if isinstance(lora, str | Path) else lora, base, lora_rank))
    # A local path is nobody else's business; a Hub id and a commit are where to find the base again.
    name = Path(base_model).name if base.revision is None else str(base_model)
    origin = {
        "base": {"name": name, "revision": base.revision, "config_sha256": sha256(base.directory / "config.json")},
        "rope_2d": spec.to_dict(),
        "adapters": tuple(adapter.to_dict() for adapter in adapters),
        "tool_version": __version__,
    }
    return Source(base, adapters, spec, end_tokens(base), origin, warnings=tuple(positions.warnings))


def from_merged(merged: Path) -> Source:
    """A directory that :func:`pos2d.merge` wrote.

    Raises:
        InputError: not a merged directory, or its weights do not fit its configuration.
    """
    manifest = read_manifest(merged)
    if manifest.kind != "merged":
        raise InputError(f"{merged} is of kind {manifest.kind}; export starts from a merged directory")
    block = manifest.to_dict()
    origin = {key: block[key] for key in ("base", "rope_2d", "adapters")} | {"tool_version": __version__}
    return Source(
        base=read_checkpoint(merged, read_config(merged)),
        adapters=(),
        spec=manifest.rope_2d,
        eos_token_ids=manifest.eos_token_ids,
        origin=origin,
        options=manifest.options,
        retention=(manifest.ledger or {}).get("totals", {}).get("retention"),
    )
