"""The weights that an artifact is made from: a base with its adapters, or a merged directory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pos2d import __version__
from pos2d.errors import InputError, UsageError
from pos2d.hashing import sha256
from pos2d.manifest import read_manifest
from pos2d.options import check_options, option
from pos2d.sources.adapters import Adapter, read_adapters
from pos2d.sources.adapters.vocabulary import resized
from pos2d.sources.checkpoints.base import read_base
from pos2d.sources.checkpoints.checkpoint import Checkpoint, read_checkpoint, read_config
from pos2d.sources.hf_config import end_tokens
from pos2d.sources.sidecars.sidecars import Sidecars
from pos2d.sources.tokenizer import choose_sidecars, sidecars_of_artifact
from pos2d.spec import MAX_STRIDE, Align, Rope2DSpec, pair_indices_for_ratio, parse_pair_indices

DEFAULT_RATIO = 0.5


@dataclass(frozen=True, slots=True)
class TrainedPositions:
    """How the training placed tokens. The trainer does not save these settings; the first three exclude one another.

    ``pair_indices`` may also be given as a sequence of numbers.

    Raises:
        UsageError: more than one of the three, or a value out of range.
    """

    rope_2d_ratio: float | None = option(
        None,
        "Share of the rotary frequencies, 0 to 1, that encode branch and time instead of the position; they are the "
        "slowest ones. Give the value of the training.",
        minimum=0,
        maximum=1,
        default_text="0.5, the trainer's default",
    )
    pair_indices: str | Sequence[int] | None = option(
        None,
        "Rotary frequencies that encode branch and time, counted from 1, such as 5,6,7,8; in place of a ratio.",
        metavar="NUMBERS",
    )
    no_patch_rope: bool = option(
        False, "The adapter was trained without 2D RoPE, as an ordinary LoRA is: tokens only have a position."
    )
    branch_stride: int = option(
        128,
        "Step between the branch positions of neighbouring branches, as in the training.",
        minimum=1,
        maximum=MAX_STRIDE,
    )
    align_to: Align = option(
        "left",
        "Prompts of different length start in the same column (left) or end in the same column (right), as in the "
        "training.",
    )

    def __post_init__(self) -> None:
        if isinstance(self.pair_indices, Sequence) and not isinstance(self.pair_indices, str):
            object.__setattr__(self, "pair_indices", ",".join(map(str, self.pair_indices)))
        check_options(self)
        if sum((self.rope_2d_ratio is not None, self.pair_indices is not None, self.no_patch_rope)) > 1:
            raise UsageError(
                "`rope_2d_ratio`, `pair_indices` and `no_patch_rope` exclude one another; give one of them"
            )

    @property
    def warnings(self) -> list[str]:
        """A sentence if the ratio is an implicit default."""
        if (self.rope_2d_ratio, self.pair_indices, self.no_patch_rope) != (None, None, False):
            return []
        return [
            f"no positions were given, so the trainer's default, `rope_2d_ratio={DEFAULT_RATIO}`, is used; if the "
            "training used another ratio, several branches give nonsense (`guess_ratio` of inspect finds it); an "
            "ordinary LoRA needs `no_patch_rope`"
        ]

    def resolve(self, frequencies: int) -> Rope2DSpec:
        """The positional contract for a base with this many rotary ``frequencies``."""
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
    """A base, the adapters to add to it, and its positions.

    ``base`` has the vocabulary and the end tokens of the result. ``sidecars``: the files that travel next to the
    weights. ``origin``: what a manifest says about where the weights come from. ``options``: whose tokenizer travels,
    and how the weights of a merged directory were summed and rounded; ``retention``: how much of its adapters that
    rounding retained, if it is recorded. ``warnings``: a sentence for each implicit default.
    """

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    spec: Rope2DSpec
    eos_token_ids: tuple[int, ...]
    sidecars: Sidecars
    origin: dict[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    retention: float | None = None
    warnings: tuple[str, ...] = ()


def from_adapters(
    base_model: str | Path,
    lora: str | Path | Sequence[str | Path],
    positions: TrainedPositions,
    *,
    then: str | Path | Sequence[str | Path] = (),
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    lora_rank: int | None = None,
) -> Source:
    """Read a base and the adapters that were trained on it.

    Raises:
        UsageError, InputError, UnsafeInputError: see :func:`pos2d.sources.checkpoints.base.read_base`,
            :func:`pos2d.sources.adapters.read_adapters` and :func:`pos2d.sources.tokenizer.choose_sidecars`.
    """
    base = read_base(base_model, revision=revision, bake_rope=not positions.no_patch_rope)
    spec = positions.resolve(base.sizes.num_frequencies)
    adapters = tuple(read_adapters(_listed(lora), base, lora_rank, _listed(then)))
    vocab = next((adapter.vocab for adapter in reversed(adapters) if adapter.vocab is not None), None)
    result = base if vocab is None else resized(base, vocab)
    sidecars, warnings = choose_sidecars(base, result, adapters, tokenizer)
    ends = end_tokens(base)
    if sidecars.end_tokens is not None:
        ends = sidecars.end_tokens
        result = replace(result, config={**result.config, "eos_token_id": list(ends)})
    # Artifacts get published, so of a local path only the name is recorded; a Hub id and a commit locate the base.
    name = Path(base_model).name if base.revision is None else str(base_model)
    origin = {
        "base": {"name": name, "revision": base.revision, "config_sha256": sha256(base.directory / "config.json")},
        "rope_2d": spec.to_dict(),
        "adapters": tuple(adapter.to_dict() for adapter in adapters),
        "tool_version": __version__,
    }
    options = {"tokenizer": sidecars.to_dict()}
    return Source(result, adapters, spec, ends, sidecars, origin, options, warnings=(*positions.warnings, *warnings))


def _listed(adapters: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return [adapters] if isinstance(adapters, str | Path) else adapters


def from_merged(merged: Path) -> Source:
    """Read a directory that :func:`pos2d.merge` wrote.

    Raises:
        InputError: not a merged directory, or its weights do not fit its configuration.
    """
    manifest = read_manifest(merged)
    if manifest.kind != "merged":
        raise InputError(f"{merged} is of kind {manifest.kind}; export starts from a merged directory")
    block = manifest.to_dict()
    origin = {key: block[key] for key in ("base", "rope_2d", "adapters")} | {"tool_version": __version__}
    base = read_checkpoint(merged, read_config(merged))
    sidecars, warnings = sidecars_of_artifact(base)
    return Source(
        base=base,
        adapters=(),
        spec=manifest.rope_2d,
        eos_token_ids=manifest.eos_token_ids,
        sidecars=sidecars,
        origin=origin,
        options=manifest.options,
        retention=(manifest.ledger or {}).get("totals", {}).get("retention"),
        warnings=tuple(warnings),
    )
