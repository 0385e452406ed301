"""Which positions an adapter was trained with: a text is scored with every candidate, and the lowest loss wins.

Adapters do not say it. A model that was trained with certain positions predicts text that is laid out with them
better than with any others, so the loss tells candidates apart as far as the choice matters.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from pos2d.exporter.inspection.pace import Pace, Scorer
from pos2d.exporter.inspection.ranking import Effort, Guess, Learnt, compare_with_base, is_ordinary, rank
from pos2d.exporter.inspection.samples import Sample, first_branches
from pos2d.exporter.inspection.search import Found, search, token_counts
from pos2d.families import CLASS_NAMES
from pos2d.layout import build_layout
from pos2d.progress import Progress
from pos2d.sources.adapters import Adapter
from pos2d.sources.checkpoints.checkpoint import EMBEDDING, HEAD, Checkpoint
from pos2d.sources.files.parallel import single_threaded_torch, submitted, thread_limit, worker_count
from pos2d.sources.files.tensor_io import TensorFile, opened
from pos2d.sources.hf_config import baked_config
from pos2d.sources.tensors.exact_rows import exact_rows
from pos2d.sources.tensors.tensor_plan import PlannedTensor, plan_tensors
from pos2d.spec import Rope2DSpec

if TYPE_CHECKING:
    import torch

# Two minutes, less what passes before and after: imports, reading the text, the last forward pass.
SECONDS = 105.0
# The most time that is kept for loading the base without the adapter.
MOST_RESERVED = 15.0
# The most samples on which the base is scored without the adapter.
BASE_SAMPLES = 4


def guess_positions(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    samples: Sequence[Sample],
    *,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Guess:
    """Score candidates on a float32 model, in ``seconds`` by ``clock``, and less text where the machine is slower.

    Where ordinary positions win, the base is loaded once more, without the adapters, to see what they learnt.
    """
    began = clock()
    pace = Pace(clock, began + seconds)
    separate = Rope2DSpec(base.sizes.num_frequencies, (), visibility="isolated")
    found = _found(base, adapters, separate, samples, pace)
    counts = token_counts(found.samples)
    ordinary = is_ordinary(found.losses, found.separate, counts)
    learnt = _learnt(base, separate, found, pace) if ordinary else None
    effort = Effort(
        sequences=len(found.samples),
        text_tokens=int(token_counts(samples).sum()),
        evaluated=pace.tokens,
        cut=pace.cut,
        seconds=clock() - began,
    )
    return rank(found.losses, found.separate, counts, effort, learnt)


def _found(
    base: Checkpoint, adapters: Sequence[Adapter], separate: Rope2DSpec, samples: Sequence[Sample], pace: Pace
) -> Found:
    """The losses with the adapters. The time of loading once more is kept for the base."""
    began = pace.clock()
    scorer = _scorer(base, adapters, separate, pace)
    pace.reserved = min(pace.clock() - began, MOST_RESERVED)
    with one_thread_if_faster(scorer, separate, first_branches(samples[0], 1)):
        return search(scorer, separate, samples)


@contextmanager
def one_thread_if_faster(scorer: Scorer, spec: Rope2DSpec, sample: Sample) -> Iterator[None]:
    """Compute with one thread inside the block if that is faster now, and the caller did not ask for a number.

    Where other programs use the cores, several threads wait for the slowest of them, and can take many times as long.
    The first passes of a model, which take longer, are over afterwards.
    """

    def seconds() -> float:
        began = scorer.pace.clock()
        scorer.branch_losses(spec, sample)
        return scorer.pace.clock() - began

    seconds()
    with_all, threads = seconds(), ExitStack()
    if thread_limit() is None:
        with single_threaded_torch():
            with_one = seconds()
        if with_one < with_all:
            threads.enter_context(single_threaded_torch())
    with threads:
        scorer.pace.add(len(sample), seconds())
        yield


def _learnt(base: Checkpoint, separate: Rope2DSpec, found: Found, pace: Pace) -> Learnt | None:
    """Compare with the base without the adapters, on the first samples; None if there is no time for one of them."""
    if not pace.allows(2 * len(found.samples[0])):
        return None
    scorer = _scorer(base, (), separate, pace)
    pace.reserved = 0.0
    alone: list[float] = []
    columns: list[float] = []
    samples = found.samples[:BASE_SAMPLES]
    with (
        one_thread_if_faster(scorer, separate, first_branches(samples[0], 1)),
        Progress("comparing with the base", len(samples), long=True) as progress,
    ):
        for sample in samples:
            if alone and not pace.allows(2 * len(sample)):
                break
            alone += scorer.losses(separate, sample)
            columns += scorer.losses(found.best_2d, sample)
            progress.advance()
    adapted = (found.separate[: len(alone)], found.losses[found.best_2d][: len(alone)])
    counts = token_counts(found.samples)[: len(alone)]
    return compare_with_base(*adapted, np.array(alone), np.array(columns), counts)


def _scorer(base: Checkpoint, adapters: Sequence[Adapter], separate: Rope2DSpec, pace: Pace) -> Scorer:
    model = merged_model(base, adapters, separate)

    def losses(spec: Rope2DSpec, sample: Sample) -> list[float]:
        model.model.rotary_emb.axes = spec.axes
        return branch_losses(model, sample, spec)

    return Scorer(losses, pace)


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
    label = "step 1 of 3, loading the model" if adapters else "loading the base without the adapter"
    with opened(base.directory, base.files) as files:
        jobs = ((tensor, files[tensor.source.file]) for tensor in plan.tensors)
        state = {}
        with (
            Progress(label, len(plan.tensors), long=True) as progress,
            # On small blocks, the threads of torch wait for each other: very long where the cores are busy.
            single_threaded_torch(),
            ThreadPoolExecutor(worker_count()) as workers,
            submitted(workers, _merged, jobs) as merged,
        ):
            for tensor, weight in zip(plan.tensors, merged, strict=True):
                state[tensor.name] = weight
                progress.advance()
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
