"""Which ratio and stride an adapter was trained with: every candidate read on a text, the lowest loss wins.

The trainer saves neither. A model that was trained with certain positions predicts text that is laid out with them
better than with any others, so the loss tells them apart as far as they matter.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pos2d.exporter.adapters import Adapter
from pos2d.exporter.adapters.deltas import exact_sum
from pos2d.exporter.artifact.hf_config import baked_config
from pos2d.exporter.files.tensor_io import TensorFile, opened
from pos2d.exporter.inputs.checkpoint import DTYPES, EMBEDDING, HEAD, Checkpoint
from pos2d.exporter.inspection.samples import Sample
from pos2d.exporter.tensors.plan import PlannedTensor, plan_merge
from pos2d.families import CLASS_NAMES
from pos2d.layout import build_layout
from pos2d.progress import Progress
from pos2d.spec import Rope2DSpec, pair_indices_for_ratio

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float64]

# The first that gives a number of frequencies names it: rounder numbers are likelier to have been typed.
RATIOS = (0.5, 1.0, 0.25, 0.75, 0.125, 0.375, 0.625, 0.875)
STRIDES = (128, 64, 256, 512, 1)
# The trainer's defaults.
DEFAULT_RATIO, DEFAULT_STRIDE = RATIOS[0], STRIDES[0]
# All candidates read the first quarter of the text, but two sequences at least; what that does not rule out reads all
# of it, within these bounds. Ratio and stride are tried together, because with a wrong stride the right ratio can be
# worse than a wrong one.
SCREENED_SHARE, SCREENED_LEAST = 0.25, 2
FINALISTS_LEAST, FINALISTS_MOST = 4, 12
# A difference counts from two standard errors on.
CERTAIN = 2.0


@dataclass(frozen=True, slots=True)
class Score:
    """One candidate; losses in nats per token.

    ``pairs`` frequencies turn with branch and time; none without 2D RoPE, which has no ratio and no stride.
    ``behind`` is the loss less the lowest one's on the same ``tokens``, ``error`` the standard error of that
    difference, and a candidate is ``ruled_out`` where it is more than two of them behind.
    """

    ratio: float | None
    pairs: int
    branch_stride: int | None
    tokens: int
    loss: float
    behind: float
    error: float
    ruled_out: bool


@dataclass(frozen=True, slots=True)
class Guess:
    """``scores`` of branches side by side, those on the whole text first, lowest loss first.

    ``ordinary`` reads every branch alone, without 2D RoPE.
    ``best`` is the lowest, or the trainer's default where that is not ruled out; ``merge_flags`` are its flags.
    ``ordinary_is_better``: it is more than two standard errors below the lowest; then the base's own leaning decides
    more than the training does, and nothing is clear. ``ratio_is_clear`` and ``stride_is_clear``: else, every other
    one is ruled out (there is but one stride without 2D RoPE).
    ``tokens`` are those that were predicted.
    """

    best: Score
    merge_flags: str
    ratio_is_clear: bool
    stride_is_clear: bool
    ordinary_is_better: bool
    scores: tuple[Score, ...]
    ordinary: Score
    frequencies: int
    sequences: int
    branches: int
    tokens: int
    seconds: float


def guess_positions(base: Checkpoint, adapters: Sequence[Adapter], samples: Sequence[Sample]) -> Guess:
    """Score every ratio with every stride on a float32 model that is built once."""
    started = time.monotonic()
    specs = candidates(base.sizes.num_frequencies)
    ordinary = Rope2DSpec(base.sizes.num_frequencies, (), visibility="isolated")
    screened = max(SCREENED_LEAST, round(len(samples) * SCREENED_SHARE))
    first, rest = samples[:screened], samples[screened:]
    model = merged_model(base, adapters, ordinary)
    found = _losses(model, specs, first, "screening")
    finalists = _finalists(found, token_counts(first))
    whole = _losses(model, [*finalists, ordinary], rest, "scoring")
    found |= {spec: np.append(found[spec], whole[spec]) for spec in finalists}
    alone = np.append(_losses(model, [ordinary], first, "scoring")[ordinary], whole[ordinary])
    return _guess(found, alone, samples, time.monotonic() - started)


def _losses(model: Any, specs: Sequence[Rope2DSpec], samples: Sequence[Sample], label: str) -> dict[Rope2DSpec, Floats]:
    """Summed loss of every branch of all samples, ``[branches]``, by candidate."""
    found: dict[Rope2DSpec, Floats] = {}
    with Progress(label, len(specs) * len(samples)) as progress:
        for spec in specs:
            model.model.rotary_emb.axes = spec.axes
            losses: list[float] = []
            for sample in samples:
                losses += branch_losses(model, sample, spec)
                progress.advance()
            found[spec] = np.array(losses)
    return found


def _finalists(found: Mapping[Rope2DSpec, Floats], counts: Floats) -> list[Rope2DSpec]:
    order = sorted(found, key=lambda spec: float(found[spec].sum()))
    gaps = [difference(found[spec], found[order[0]], counts) for spec in order]
    left = sum(behind <= CERTAIN * error for behind, error in gaps)
    return order[: min(max(left, FINALISTS_LEAST), FINALISTS_MOST)]


def token_counts(samples: Sequence[Sample]) -> Floats:
    """Predicted tokens of every branch of all samples."""
    return np.array([len(b.ids) - b.start for sample in samples for b in sample.branches], dtype=np.float64)


def candidates(frequencies: int) -> list[Rope2DSpec]:
    """No 2D RoPE, and every ratio with every stride."""
    ratios = distinct_ratios(frequencies)
    pairs = [pair_indices_for_ratio(frequencies, ratio) for ratio in ratios]
    return [Rope2DSpec(frequencies, ()), *(Rope2DSpec(frequencies, p, stride) for p in pairs for stride in STRIDES)]


def distinct_ratios(frequencies: int) -> dict[float, int]:
    """Ratio to number of frequencies, ascending, every number once."""
    named: dict[int, float] = {}
    for ratio in RATIOS:
        named.setdefault(len(pair_indices_for_ratio(frequencies, ratio)), ratio)
    return {named[count]: count for count in sorted(named)}


def merged_model(base: Checkpoint, adapters: Sequence[Adapter], spec: Rope2DSpec) -> Any:
    """The base with the adapters' changes, in float32 on the CPU, without writing anything."""
    import torch

    from pos2d.hf import configuration_pos2d, modeling_pos2d

    plan = plan_merge(base, adapters, "float32")
    name = CLASS_NAMES[base.sizes.family]
    values = baked_config(base, spec, "float32", plan.tied)
    config = getattr(configuration_pos2d, f"{name}Config").from_dict(
        {key: value for key, value in values.items() if key not in ("auto_map", "architectures")}
    )
    with torch.device("meta"):  # no random weights to throw away
        model = getattr(modeling_pos2d, f"{name}ForCausalLM")(config).eval()
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(type(rotary.stock)(config), spec.axes)
    with opened(base.directory, base.files) as files:
        state = {tensor.name: _merged(tensor, files[tensor.source.file]) for tensor in plan.tensors}
    if plan.tied:
        state[HEAD] = state[EMBEDDING]
    model.load_state_dict(state, assign=True)
    return model


def _merged(tensor: PlannedTensor, file: TensorFile) -> "torch.Tensor":
    import torch

    place = tensor.source
    data = memoryview(bytearray(place.nbytes))
    file.read_into(tensor.origin, place, 0, data)
    weight = torch.frombuffer(data, dtype=getattr(torch, DTYPES[place.dtype][0])).reshape(place.shape)
    changes = [change.widened() for change in tensor.changes]
    return (exact_sum(weight.double(), changes, slice(None))[0] if changes else weight).float()


def branch_losses(model: Any, sample: Sample, spec: Rope2DSpec) -> list[float]:
    """Summed next-token loss (nats) of every branch, laid out as ``spec`` says; the model's axes are those of it."""
    import torch
    from torch.nn.functional import cross_entropy

    layout = build_layout([branch.ids for branch in sample.branches], spec, sample.context or None)
    slots = [np.flatnonzero(layout.owners == number) for number in range(len(sample.branches))]
    taught = [own[branch.start :] for own, branch in zip(slots, sample.branches, strict=True)]
    readers = [own[branch.start - 1 : -1] for own, branch in zip(slots, sample.branches, strict=True)]
    with torch.inference_mode():
        hidden = model.model(
            input_ids=torch.from_numpy(layout.ids)[None],
            position_ids=torch.from_numpy(layout.positions)[None],
            pos2d=torch.from_numpy(layout.pos2d)[None],
            attention_mask=torch.from_numpy(layout.mask())[None, None],
            use_cache=False,
        ).last_hidden_state[0]
        logits = model.lm_head(hidden[torch.from_numpy(np.concatenate(readers))])
        targets = torch.from_numpy(layout.ids[np.concatenate(taught)])
        losses = cross_entropy(logits, targets, reduction="none").double()
    return [float(part.sum()) for part in torch.split(losses, [len(own) for own in taught])]


def difference(losses: Floats, reference: Floats, counts: Floats) -> tuple[float, float]:
    """Mean per token of ``losses - reference`` and its standard error, from the spread between branches.

    All ``[branches]``: summed losses, and tokens. Tokens of one branch depend on each other, branches hardly do, so
    the error is that of a ratio estimate with a branch as the unit.
    """
    gaps, units = losses - reference, len(counts)
    mean = float(gaps.sum() / counts.sum())
    spread = float(((gaps - mean * counts) ** 2).sum()) * units / (units - 1)
    return mean, spread**0.5 / float(counts.sum())


def _guess(found: Mapping[Rope2DSpec, Floats], alone: Floats, samples: Sequence[Sample], seconds: float) -> Guess:
    counts = token_counts(samples)
    frequencies = next(iter(found)).num_frequencies
    names = {count: ratio for ratio, count in distinct_ratios(frequencies).items()}
    lowest = min((losses for losses in found.values() if len(losses) == len(counts)), key=np.sum)

    def score(pairs: int, stride: int, losses: Floats) -> Score:
        read = len(losses)
        behind, error = difference(losses, lowest[:read], counts[:read])
        return Score(
            ratio=names.get(pairs),
            pairs=pairs,
            branch_stride=stride if pairs else None,
            tokens=int(counts[:read].sum()),
            loss=float(losses.sum() / counts[:read].sum()),
            behind=behind,
            error=error,
            ruled_out=behind > CERTAIN * error,
        )

    scores = [score(len(spec.pair_indices), spec.branch_stride, losses) for spec, losses in found.items()]
    scores.sort(key=lambda one: (-one.tokens, one.behind))
    best, ordinary = choose(scores), score(0, DEFAULT_STRIDE, alone)
    left = [other for other in scores if not other.ruled_out]
    trained = -ordinary.behind <= CERTAIN * ordinary.error
    strides = {other.branch_stride for other in left if other.pairs == best.pairs}
    return Guess(
        best=best,
        merge_flags=merge_flags(best),
        ratio_is_clear=trained and all(other.pairs == best.pairs for other in left),
        stride_is_clear=trained and strides == {best.branch_stride},
        ordinary_is_better=not trained,
        scores=tuple(scores),
        ordinary=ordinary,
        frequencies=frequencies,
        sequences=len(samples),
        branches=len(counts),
        tokens=int(counts.sum()),
        seconds=seconds,
    )


def choose(scores: Sequence[Score]) -> Score:
    """The lowest loss, but what is not ruled out on the whole text yields to the trainer's defaults, ratio first."""
    left = [score for score in scores if not score.ruled_out and score.tokens == scores[0].tokens]
    usual = [score for score in left if score.ratio == DEFAULT_RATIO] or [s for s in left if s.pairs == left[0].pairs]
    return next((score for score in usual if score.branch_stride == DEFAULT_STRIDE), usual[0])


def merge_flags(score: Score) -> str:
    if not score.pairs:
        return "--no-patch-rope"
    return f"--rope-2d-ratio {score.ratio} --branch-stride {score.branch_stride}"
