"""Which ratio and stride an adapter was trained with: a text is scored with every candidate, and the lowest loss wins.

The trainer saves neither. A model that was trained with certain positions predicts text that is laid out with them
better than with any others, so the loss tells candidates apart as far as the choice matters.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pos2d.exporter.inspection.position_grid import position_grid
from pos2d.exporter.inspection.ranking import Floats, Guess, finalists, rank
from pos2d.exporter.inspection.samples import Sample
from pos2d.families import CLASS_NAMES
from pos2d.layout import build_layout
from pos2d.progress import Progress
from pos2d.sources.adapters import Adapter
from pos2d.sources.checkpoints.checkpoint import EMBEDDING, HEAD, Checkpoint
from pos2d.sources.files.tensor_io import TensorFile, opened
from pos2d.sources.hf_config import baked_config
from pos2d.sources.tensors.exact_rows import exact_rows
from pos2d.sources.tensors.tensor_plan import PlannedTensor, plan_tensors
from pos2d.spec import Rope2DSpec

if TYPE_CHECKING:
    import torch

# Every candidate is screened on the first quarter of the text, on two sequences at least. The finalists, which are
# those that are tied with the lowest loss then, are scored on all of it.
SCREENED_SHARE, MIN_SCREENED = 0.25, 2
MIN_FINALISTS, MAX_FINALISTS = 4, 12


def guess_positions(base: Checkpoint, adapters: Sequence[Adapter], samples: Sequence[Sample]) -> Guess:
    """Score every ratio with every stride, on a float32 model that is built once."""
    started = time.monotonic()
    separate = Rope2DSpec(base.sizes.num_frequencies, (), visibility="isolated")
    screened = max(MIN_SCREENED, round(len(samples) * SCREENED_SHARE))
    first, others = samples[:screened], samples[screened:]
    model = merged_model(base, adapters, separate)
    losses = _losses(model, position_grid(base.sizes.num_frequencies), first, "screening")
    final = finalists(losses, token_counts(first), MIN_FINALISTS, MAX_FINALISTS)
    on_others = _losses(model, [*final, separate], others, "scoring")
    on_first = losses | _losses(model, [separate], first, "scoring")
    whole = {spec: np.append(on_first[spec], on_others[spec]) for spec in (*final, separate)}
    return rank(
        losses | {spec: whole[spec] for spec in final},
        whole[separate],
        token_counts(samples),
        sequences=len(samples),
        seconds=time.monotonic() - started,
    )


def _losses(model: Any, specs: Sequence[Rope2DSpec], samples: Sequence[Sample], label: str) -> dict[Rope2DSpec, Floats]:
    """Summed loss of every branch of all samples, ``[branches]``, by candidate."""
    losses: dict[Rope2DSpec, Floats] = {}
    with Progress(label, len(specs) * len(samples)) as progress:
        for spec in specs:
            model.model.rotary_emb.axes = spec.axes
            of_spec: list[float] = []
            for sample in samples:
                of_spec += branch_losses(model, sample, spec)
                progress.advance()
            losses[spec] = np.array(of_spec)
    return losses


def token_counts(samples: Sequence[Sample]) -> Floats:
    """Number of predicted tokens of every branch of all samples, ``[branches]``."""
    return np.array([len(b.ids) - b.start for sample in samples for b in sample.branches], dtype=np.float64)


def merged_model(base: Checkpoint, adapters: Sequence[Adapter], spec: Rope2DSpec) -> Any:
    """The base with the adapters' changes, in float32 on the CPU, without writing anything."""
    from pos2d.hf import configuration_pos2d
    from pos2d.hf.empty_model import empty_model

    plan = plan_tensors(base, adapters, "float32")
    name = CLASS_NAMES[base.sizes.family]
    values = baked_config(base, spec, "float32", plan.tied)
    config = getattr(configuration_pos2d, f"{name}Config").from_dict(
        {key: value for key, value in values.items() if key not in ("auto_map", "architectures")}
    )
    model = empty_model(config, f"{name}ForCausalLM").eval()
    with opened(base.directory, base.files) as files:
        state = {tensor.name: _merged(tensor, files[tensor.source.file]) for tensor in plan.tensors}
    if plan.tied:
        state[HEAD] = state[EMBEDDING]
    model.load_state_dict(state, assign=True)
    return model


def _merged(tensor: PlannedTensor, file: TensorFile) -> "torch.Tensor":
    import torch

    return torch.cat([block.exact.float() for block in exact_rows(tensor, file)])


def branch_losses(model: Any, sample: Sample, spec: Rope2DSpec) -> list[float]:
    """Summed next-token loss (nats) of the completion tokens of every branch, laid out as ``spec`` says.

    The model's axes must be those of ``spec``.
    """
    import torch
    from torch.nn.functional import cross_entropy

    layout = build_layout([branch.ids for branch in sample.branches], spec, sample.context or None)
    slots = [np.flatnonzero(layout.owners == number) for number in range(len(sample.branches))]
    targets = [branch_slots[branch.start :] for branch_slots, branch in zip(slots, sample.branches, strict=True)]
    # The token before a target in its branch predicts it.
    predictors = [
        branch_slots[branch.start - 1 : -1] for branch_slots, branch in zip(slots, sample.branches, strict=True)
    ]
    with torch.inference_mode():
        hidden = model.model(
            input_ids=torch.from_numpy(layout.ids)[None],
            position_ids=torch.from_numpy(layout.positions)[None],
            pos2d=torch.from_numpy(layout.pos2d)[None],
            attention_mask=torch.from_numpy(layout.mask())[None, None],
            use_cache=False,
        ).last_hidden_state[0]
        logits = model.lm_head(hidden[torch.from_numpy(np.concatenate(predictors))])
        target_ids = torch.from_numpy(layout.ids[np.concatenate(targets)])
        losses = cross_entropy(logits, target_ids, reduction="none").double()
    return [float(part.sum()) for part in torch.split(losses, [len(part) for part in targets])]
