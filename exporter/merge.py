"""Merge an adapter into its base and bake the positions: base + LoRA -> a Hugging Face directory."""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.adapter import Adapter, read_adapter
from exporter.base import Checkpoint, read_base
from exporter.companions import copy_companions
from exporter.config import baked_config, end_tokens
from exporter.staging import file_facts, refuse_existing, sha256, staged, write_json
from exporter.weights import write_merged_weights
from pos2d import __version__, hf
from pos2d.errors import UsageError
from pos2d.manifest import Manifest
from pos2d.spec import Align, Rope2DSpec, pair_indices_for_ratio, parse_pair_indices

DTYPES = ("float32", "float16", "bfloat16")
DEFAULT_RATIO = 0.5
TRAVELLING_CODE = ("configuration_pos2d.py", "modeling_pos2d.py")


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge wrote; ``bytes`` is the size of the whole directory."""

    output: str
    family: str
    rank: int
    modules: int
    tensors: int
    dtype: str
    rope_2d: Mapping[str, Any]
    bytes: int
    seconds: float


def merge(
    base_model: str | Path,
    lora: str | Path,
    output: str | Path,
    *,
    rope_2d_ratio: float | None = None,
    pair_indices: str | Sequence[int] | None = None,
    no_patch_rope: bool = False,
    branch_stride: int = 128,
    align_to: Align = "left",
    lora_rank: int | None = None,
    dtype: str = "auto",
) -> MergeReport:
    """Write ``output``: the base with ``W + B @ A`` in place of every adapted weight, and its positions baked.

    The sum is taken in float32 and rounded once, to ``dtype`` (``auto``: each tensor keeps the base's).
    ``rope_2d_ratio`` (0.5 when nothing is said), ``pair_indices`` and ``no_patch_rope`` exclude one another.

    Raises:
        UsageError: flags that contradict each other.
        InputError: see :func:`exporter.base.read_base` and :func:`exporter.adapter.read_adapter`.
        UnsafeInputError: an adapter that would run code, an index that leaves its directory.
        OutputError, StorageError: see :func:`exporter.staging.staged`.
    """
    started = time.monotonic()
    output = Path(output)
    _check_flags(rope_2d_ratio, pair_indices, no_patch_rope, dtype)
    refuse_existing(output)
    base = read_base(str(base_model), bake_rope=not no_patch_rope)
    spec = _resolve_spec(
        base.sizes.num_frequencies, rope_2d_ratio, pair_indices, no_patch_rope, branch_stride, align_to
    )
    adapter = read_adapter(lora, base, lora_rank)

    with staged(output) as staging:
        stored = write_merged_weights(base, adapter, dtype, staging)
        write_json(staging / "config.json", baked_config(base, spec, stored))
        for name in TRAVELLING_CODE:
            shutil.copyfile(Path(hf.__file__).parent / name, staging / name)
        copy_companions(base.directory, staging)
        manifest = _manifest(str(base_model), base, adapter, spec, stored, file_facts(staging))
        manifest.write(staging)
    return MergeReport(
        output=str(output),
        family=manifest.family,
        rank=adapter.rank,
        modules=len(adapter.factors),
        tensors=len(base.tensors),
        dtype=stored,
        rope_2d=spec.to_dict(),
        bytes=manifest.total_bytes,
        seconds=time.monotonic() - started,
    )


def _manifest(
    base_model: str,
    base: Checkpoint,
    adapter: Adapter,
    spec: Rope2DSpec,
    dtype: str,
    files: Mapping[str, Mapping[str, Any]],
) -> Manifest:
    # A local path is nobody else's business; a Hub id is where to find the base again.
    name = Path(base_model).name if Path(base_model).is_dir() else base_model
    return Manifest(
        kind="merged",
        family=base.sizes.family,
        dtype=dtype,
        vocab_size=base.sizes.vocab,
        context_length=base.sizes.context_length,
        eos_token_ids=end_tokens(base),
        rope_2d=spec,
        base={"name": name, "config_sha256": sha256(base.directory / "config.json")},
        adapter=adapter.to_dict(),
        files=files,
        tool_version=__version__,
    )


def _check_flags(ratio: float | None, pair_indices: object, no_patch_rope: bool, dtype: str) -> None:
    if sum((ratio is not None, pair_indices is not None, no_patch_rope)) > 1:
        raise UsageError("--rope-2d-ratio, --pair-indices and --no-patch-rope exclude one another; give one of them")
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")


def _resolve_spec(
    frequencies: int,
    ratio: float | None,
    pair_indices: str | Sequence[int] | None,
    no_patch_rope: bool,
    branch_stride: int,
    align_to: Align,
) -> Rope2DSpec:
    if no_patch_rope:
        return Rope2DSpec(frequencies, (), branch_stride, align_to, visibility="isolated")
    if pair_indices is not None:
        indices = parse_pair_indices(pair_indices)
    else:
        indices = pair_indices_for_ratio(frequencies, DEFAULT_RATIO if ratio is None else ratio)
    return Rope2DSpec(frequencies, indices, branch_stride, align_to)
