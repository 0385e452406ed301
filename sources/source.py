"""The weights that an artifact is made from: a base with its adapters, a plain model, or what merge wrote."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os.path import abspath
from pathlib import Path
from typing import Any

from pos2d import __version__
from pos2d.errors import InputError, UsageError
from pos2d.hashing import sha256
from pos2d.manifest import MERGES, Kind, Manifest, is_artifact, read_manifest
from pos2d.sources.adapters import Adapter, read_adapters
from pos2d.sources.adapters.vocabulary import resized
from pos2d.sources.base_options import BaseOptions
from pos2d.sources.checkpoints.base import read_base
from pos2d.sources.checkpoints.checkpoint import Checkpoint, read_checkpoint, read_config
from pos2d.sources.checkpoints.location import split_revision
from pos2d.sources.checkpoints.rope import rope_settings
from pos2d.sources.checkpoints.weight_files import CONFIG
from pos2d.sources.hf_config import end_tokens
from pos2d.sources.positions import TrainedPositions, choose_positions
from pos2d.sources.sidecars.sidecars import Sidecars
from pos2d.sources.stock_rope import still_frequencies
from pos2d.sources.tokenizer import choose_sidecars, sidecars_of_artifact
from pos2d.spec import Rope2DSpec, spans


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A base, the adapters to add to it, and its positions.

    ``base`` has the vocabulary and the end tokens of the result. ``sidecars``: the files that travel next to the
    weights. ``origin``: what a manifest says about where the weights come from. ``options``: whose tokenizer travels,
    and how the weights of a merged directory were summed and rounded; ``retention``: how much of its adapters that
    rounding retained, if it is recorded. ``reference``: a directory that computes the same, which a sum of base and
    adapters does not have, nor a plain model to which 2D RoPE or a tokenizer is given. ``one_branch_of``: see
    :class:`pos2d.manifest.Manifest`. ``warnings``: a sentence for each default that may be wrong; ``notes``: what else
    was decided by default.
    """

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    spec: Rope2DSpec
    eos_token_ids: tuple[int, ...]
    sidecars: Sidecars
    origin: dict[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    reference: Path | None = None
    one_branch_of: Rope2DSpec | None = None
    retention: float | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        """The kind of its merge: a stock checkpoint if it has no 2D RoPE."""
        return "merged" if self.spec.is_2d else "stock"

    def manifest(self, **facts: Any) -> Manifest:
        """The manifest of an artifact of this source; ``facts`` are the fields that the source does not decide."""
        sizes = self.base.sizes
        decided = {
            "family": sizes.family,
            "vocab_size": sizes.vocab,
            "context_length": sizes.context_length,
            "eos_token_ids": self.eos_token_ids,
            "options": self.options,
            "one_branch_of": self.one_branch_of,
        }
        return Manifest(**{**decided, **self.origin, "rope_2d": self.spec, **facts})

    @property
    def one_branch(self) -> Rope2DSpec:
        """The positions of one branch of this model, which are ordinary: the branch frequencies never turn."""
        return Rope2DSpec(self.spec.num_frequencies, (), visibility="isolated") if self.spec.is_2d else self.spec

    @property
    def one_branch_facts(self) -> Mapping[str, Rope2DSpec | None]:
        """The manifest's fields for the positions of an artifact that has one branch of this model."""
        return {"rope_2d": self.one_branch, "one_branch_of": self.spec if self.spec.is_2d else self.one_branch_of}


def read_source(model: str | Path | None, base: BaseOptions, positions: TrainedPositions) -> Source:
    """Read ``model``, a directory that merge wrote or a plain model, or what ``base`` names.

    A plain model is a Hugging Face directory, or the id of one on the Hub as ``ORG/NAME@REVISION``.

    Raises:
        UsageError: both or neither are given, or options that do not apply to ``model``.
        InputError, UnsafeInputError: see :func:`from_merged` and :func:`from_adapters`.
    """
    if (model is None) == (base.base_model is None):
        raise UsageError("give either a model, or `base_model` and usually `lora`")
    if model is None:
        return from_adapters(**asdict(base), positions=positions)
    if base != BaseOptions():
        raise UsageError("`lora`, `then`, `tokenizer`, `lora_rank` and `revision` belong to `base_model`; give that")
    if is_artifact(model):
        if positions != TrainedPositions():
            raise UsageError(f"{model} stores its positions; leave out those of the training")
        return from_merged(Path(model))
    return from_adapters(model, (), positions)


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
    """Read a base and the adapters that were trained on it, if any.

    Raises:
        UsageError, InputError, UnsafeInputError: see :func:`pos2d.sources.checkpoints.base.read_base`,
            :func:`pos2d.sources.adapters.read_adapters` and :func:`pos2d.sources.tokenizer.choose_sidecars`.
    """
    base = read_base(base_model, revision=revision, bake_rope=not positions.no_patch_rope)
    if not _listed(lora) and (_listed(then) or lora_rank is not None):
        raise UsageError("`then` and `lora_rank` belong to `lora`; give an adapter")
    adapters = tuple(read_adapters(_listed(lora), base, lora_rank, _listed(then))) if _listed(lora) else ()
    chosen = choose_positions(positions, {adapter.name: adapter.form for adapter in adapters})
    spec = chosen.positions.resolve(base.sizes.num_frequencies)
    one_branch_of = _one_branch_of(base, spec)
    vocab = next((adapter.vocab for adapter in reversed(adapters) if adapter.vocab is not None), None)
    result = base if vocab is None else resized(base, vocab)
    sidecars, warnings = choose_sidecars(base, result, adapters, tokenizer)
    ends = end_tokens(base)
    if sidecars.end_tokens is not None:
        ends = sidecars.end_tokens
        result = replace(result, config={**result.config, "eos_token_id": list(ends)})
    # Artifacts get published, so of a local path only the name is recorded; a Hub id and a commit locate the base.
    name = Path(abspath(base_model)).name if base.revision is None else split_revision(str(base_model))[0]
    origin = {
        "base": {"name": name, "revision": base.revision, "config_sha256": sha256(base.directory / CONFIG)},
        "rope_2d": spec.to_dict(),
        "adapters": tuple(adapter.to_dict() for adapter in adapters),
        "tool_version": __version__,
    }
    options = {"tokenizer": sidecars.to_dict()}
    is_plain = not adapters and tokenizer is None and not spec.is_2d and not is_artifact(base.directory)
    return Source(
        result,
        adapters,
        spec,
        ends,
        sidecars,
        origin,
        options,
        reference=base.directory if is_plain else None,
        one_branch_of=one_branch_of,
        warnings=(*chosen.warnings, *warnings),
        notes=chosen.notes,
    )


def _one_branch_of(base: Checkpoint, spec: Rope2DSpec) -> Rope2DSpec | None:
    """The 2D RoPE of which the base itself has one branch, as far as its manifest says it.

    Raises:
        InputError: it has one branch, and 2D RoPE would be baked into it.
    """
    path = base.directory / CONFIG
    still = still_frequencies(rope_settings(base.config, str(path)))
    if still and spec.is_2d:
        raise InputError(
            f"{path}: rotary frequencies {spans(still)} do not turn, so this base is one branch of a model with 2D "
            "RoPE; take the original base, or give `no_patch_rope` for an adapter that was trained on this one"
        )
    return read_manifest(base.directory).one_branch_of if still and is_artifact(base.directory) else None


def _listed(adapters: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return [adapters] if isinstance(adapters, str | Path) else adapters


def from_merged(merged: Path) -> Source:
    """Read a directory that :func:`pos2d.merge` wrote.

    Raises:
        InputError: not a merged directory, or its weights do not fit its configuration.
    """
    manifest = read_manifest(merged)
    if manifest.kind not in MERGES or manifest.quant is not None:
        quantised = ", quantised" if manifest.quant is not None else ""
        raise InputError(f"{merged} is of kind {manifest.kind}{quantised}; export starts from a merge or a plain model")
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
        reference=merged,
        one_branch_of=manifest.one_branch_of,
        retention=(manifest.ledger or {}).get("totals", {}).get("retention"),
        warnings=tuple(warnings),
    )
