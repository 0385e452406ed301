"""Say what every format of a model needs, which of them fit, and which one to take; no weight is read."""

from dataclasses import dataclass
from pathlib import Path

from pos2d.errors import UsageError
from pos2d.exporter.planning.candidates import (
    Candidate,
    PlannedRun,
    artifact_sizes,
    candidates_of_artifact,
    candidates_of_model,
    linear_dtype,
)
from pos2d.exporter.planning.footprint import Workload
from pos2d.exporter.planning.recommendation import recommend
from pos2d.manifest import is_artifact
from pos2d.options import takes_options
from pos2d.sources.checkpoints.base import read_base
from pos2d.units import parse_size

ADAPTER_HINT = (
    "with an adapter: the needs are the same; give `base_model` {base} and `lora` in place of the model, and "
    "`rope_2d_ratio` if the training used 2D RoPE"
)


@dataclass(frozen=True, slots=True)
class PlanReport:
    """The ``candidates`` for running ``model``, the names of the ``fitting`` ones, and the ``recommended`` one.

    ``what`` describes the model; ``hint`` says how the commands change with an adapter. ``context``: positions of all
    branches together, at most those of the model. ``memory_available`` and ``gpu_memory`` are in bytes.
    """

    model: str
    what: str
    branches: int
    context: int
    memory_available: int
    gpu_memory: int | None
    candidates: tuple[Candidate, ...]
    fitting: tuple[str, ...]
    recommended: str | None
    reason: str
    hint: str


@takes_options()
def plan(
    model: str | Path, *, gpu_memory: str | int | None = None, branches: int = 1, context: int = 4096
) -> PlanReport:
    """Compute what each format of ``model`` needs, from its configuration, headers and manifest alone.

    Args:
        model: an artifact's directory, or a plain model: a directory or a Hub id.
        gpu_memory: memory of the GPU to run on, such as ``8GB``; without it, formats must fit in the memory that this
            machine has available.
        branches: prompts that are answered at the same time.
        context: positions in the cache at the end, of all branches together.

    Raises:
        UsageError: a size that cannot be read, or a number below 1.
        InputError: see :func:`pos2d.sources.checkpoints.base.read_base` and :func:`pos2d.manifest.read_manifest`.
        UnsafeInputError: weights that would run code.
    """
    import psutil

    gpu_bytes = None if gpu_memory is None else parse_size(gpu_memory, "gpu_memory")
    for name, number in (("branches", branches), ("context", context)):
        if number < 1:
            raise UsageError(f"`{name}` {number} must be at least 1")
    base = None
    if is_artifact(model):
        sizes, what = artifact_sizes(Path(model))
    else:
        base = read_base(str(model))
        sizes, what = base.sizes, f"plain model, {linear_dtype(base)}"
    positions = min(context, sizes.context_length)
    run = PlannedRun(sizes, Workload.of(branches, positions), on_gpu=gpu_bytes is not None)
    if base is None:
        candidates = candidates_of_artifact(Path(model), run)
    else:
        candidates = candidates_of_model(base, str(model), run)
    available = psutil.virtual_memory().available
    fitting = [candidate for candidate in candidates if candidate.fits(available, gpu_bytes)]
    recommended, reason = recommend(candidates, fitting, on_gpu=gpu_bytes is not None)
    return PlanReport(
        model=str(model),
        what=what,
        branches=branches,
        context=positions,
        memory_available=available,
        gpu_memory=gpu_bytes,
        candidates=tuple(candidates),
        fitting=tuple(candidate.name for candidate in fitting),
        recommended=None if recommended is None else recommended.name,
        reason=reason,
        hint="" if base is None else ADAPTER_HINT.format(base=model),
    )
