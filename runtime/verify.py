"""Check an artifact: its files, and its logits against another artifact or against what the exact model predicts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pos2d.errors import ParityError, UsageError
from pos2d.file_checks import check_files
from pos2d.layout import Layout, build_layout
from pos2d.manifest import GRAPH_KINDS
from pos2d.options import takes_options
from pos2d.progress import Progress
from pos2d.reference import COLUMNS, ONE_BRANCH, Reference, read_reference
from pos2d.runtime.backends.options import LoadDtype, LoadOptions
from pos2d.runtime.engine.backend import Floats
from pos2d.runtime.engine.decode import forward
from pos2d.runtime.engine.spans import batch_cache, forward_spans
from pos2d.runtime.evaluation.exact_probe import ExactDistance, distance_in_batch, distance_in_sequence, judged
from pos2d.runtime.evaluation.integrity import check_settings
from pos2d.runtime.evaluation.parity import CaseParity, check_same_model, compare
from pos2d.runtime.load import load_opened
from pos2d.runtime.model.model import Model
from pos2d.runtime.opening.opened_model import OpenedModel, open_model
from pos2d.threads import ThreadOptions

DEFAULT_RTOL = 1e-3
# How many times the tolerance a single position of a case may differ.
SENSITIVE = 10
MAX_MEAN_KL = 1e-6
MIN_TOP1 = 0.99
# Limits for a float16 graph, whose rounding steps are about a thousandth of a value.
HALF_RTOL, HALF_MEAN_KL, HALF_TOP1 = 2e-2, 1e-4, 0.95
PROBE_SEED = 20240601
# Decode steps after the prompts of a probe.
STEPS = 8
# Tokens of the context and of each branch; a model with fewer than PROBE_SPAN positions gets shorter probes.
PROBES: Mapping[str, tuple[int, tuple[int, ...]]] = {
    ONE_BRANCH: (0, (48,)),
    COLUMNS: (24, (12, 7, 16, 9)),
}
PROBE_SPAN = 128


@dataclass(frozen=True, slots=True)
class ParityReport:
    """The worst figure of all cases, and each case; they are absent where only files were compared.

    ``files``: how many files have the content that was written. ``rtol`` is absent for quantised artifacts. ``cure``
    names the parameters of ``export`` with which a quantised artifact passes, and is empty if it passed. ``exact``: the
    distance of a quantised graph to the exact model, if the artifact has that model's predictions.
    """

    rtol: float | None
    min_top1: float
    max_mean_kl: float
    passed: bool
    max_abs_diff: float | None
    max_rel_diff: float | None
    top1_agreement: float | None
    mean_kl: float | None
    cases: tuple[CaseParity, ...]
    cure: str = ""
    exact: ExactDistance | None = None
    files: int = 0

    def raise_if_failed(self) -> None:
        """Raise an error that says which figures failed.

        Raises:
            ParityError: a figure is outside its tolerance.
        """
        if self.passed:
            return
        if self.exact is not None and not self.exact.passed and not self.cure:
            raise ParityError(
                f"the graphs are not the model that was exported, {_figures(self.exact)}; do not use this artifact"
            )
        if self.rtol is None:
            raise ParityError(
                f"rounding activations to 8 bits changes the logits, {_figures(self)}; export it again with {self.cure}"
            )
        raise ParityError(
            f"logits differ by up to {self.max_rel_diff:.1e} of the largest (tolerance {self.rtol:.0e}) "
            f"{_figures(self)}; do not use this artifact"
        )


def _figures(report: "ParityReport | ExactDistance") -> str:
    return (
        f"with a KL of {report.mean_kl:.0e} (at most {report.max_mean_kl:.0e}), and the top token agrees on "
        f"{report.top1_agreement:.1%} (at least {report.min_top1:.0%})"
    )


@takes_options(ThreadOptions)
def verify(
    model: str | Path, against: str | Path | None = None, *, rtol: float = DEFAULT_RTOL, **options: Any
) -> ParityReport:
    """Check the files of ``model``, and its logits: against those of ``against``, both computed in float32.

    Every file but the model card is compared with the SHA-256 in the manifest, and what the manifest says of
    positions, sizes and end tokens with graphs and ``config.json``. Without ``against`` that is all that is checked
    of an artifact that is not a quantised graph.

    A float16 graph computes in its own type and has wider limits. A quantised graph is expected to differ from other
    artifacts. It is compared with itself with float activations, on tokens that it samples, and passes with a mean KL
    of at most 0.05 nats per position and the same top token at 90 % of them. All its graphs are also compared with what
    the exact model predicts for held-out tokens, which the export stored: they must be as close to it as they were at
    the export.

    The probes are fixed pseudo-random token ids. In the cached cases both models are fed the reference's greedy tokens,
    so that every step compares the same sequence. An artifact passes when every logit agrees within ``rtol`` times the
    largest one, the mean KL of every case is at most 1e-6 nats per position, and the top token agrees at 99 % or more
    of the positions. One position of a case may differ by ten times ``rtol``. (Float32 kernels of two libraries differ
    by about 1e-5, and at single positions with massive activations by 1e-3, as either does from float64.)

    Raises:
        InputError: either is no model, a file changed, or they are not the same model.
        UsageError: a tolerance that is not positive, a quantised reference, or a reference for a quantised artifact.
    """
    if not rtol > 0:
        raise UsageError(f"`rtol` {rtol} must be above 0")
    if against is None and rtol != DEFAULT_RTOL:
        raise UsageError("`rtol` belongs to `against`; rounded activations are judged by KL and top token")
    threads = ThreadOptions(**options).threads
    opened = open_model(model)
    reference = None if against is None else open_model(against)
    directory, manifest = opened.directory, opened.manifest
    if reference is not None:
        _refuse_quantised(opened, reference)
        check_same_model(opened, reference)
    elif opened.source is not None:
        raise UsageError(
            f"{model} is a plain model, and nothing says what it should compute; give `against` to compare it"
        )
    files = 0
    if opened.source is None:
        files = check_files(directory, manifest)
        check_settings(directory, manifest)
    if reference is not None:
        report = _verify_against(_load(opened, threads), _load(reference, threads), rtol)
    elif manifest.graph_quant is not None:
        report = _verify_quantised(load_opened(opened, LoadOptions(threads=threads)), read_reference(directory))
    else:
        report = _report((), None)
    return replace(report, files=files)


def _refuse_quantised(*compared: OpenedModel) -> None:
    for opened in compared:
        if opened.manifest.quant is not None or opened.manifest.graph_quant is not None:
            raise UsageError(
                f"{opened.place} is quantised, so its logits differ; `pos2d eval` measures how much that matters"
            )


def _verify_against(candidate: Model, reference: Model, rtol: float) -> ParityReport:
    cases = _compare_models(candidate, reference)
    if candidate.manifest.dtype == "float16" and candidate.manifest.kind in GRAPH_KINDS:
        return _report(cases, max(rtol, HALF_RTOL), HALF_TOP1, HALF_MEAN_KL)
    return _report(cases, rtol)


def _load(opened: OpenedModel, threads: int | None) -> Model:
    """Load a model in float32 on the CPU; a graph has only one type."""
    dtype: LoadDtype = "auto" if opened.manifest.kind in GRAPH_KINDS else "float32"
    return load_opened(opened, LoadOptions(device="cpu", dtype=dtype, threads=threads))


def _verify_quantised(model: Model, reference: Reference | None) -> ParityReport:
    """The cases go from the cheapest graph to the most general one, because a session never goes back."""
    from pos2d.runtime.evaluation.activation_probe import MAX_MEAN_KL, MIN_TOP1, compare_activations

    predictions = () if reference is None else reference.predictions
    distances = [distance_in_sequence(model, prediction) for prediction in predictions]
    cases, cure = compare_activations(model)
    report = replace(_report(cases, None, MIN_TOP1, MAX_MEAN_KL), cure=cure)
    if reference is None:
        return report
    if model.manifest.has_branches:
        distances.append(distance_in_batch(model, predictions))
    exact = judged(model.manifest, reference, distances)
    return replace(report, exact=exact, passed=report.passed and exact.passed)


def _compare_models(candidate: Model, reference: Model) -> list[CaseParity]:
    """Every probe with a cache and in one pass, and all probes in one batch, as far as the candidate has branches."""
    cases: list[CaseParity] = []
    has_branches = candidate.manifest.has_branches
    probes = PROBES if has_branches else {ONE_BRANCH: PROBES[ONE_BRANCH]}
    with Progress("verifying", 2 * len(probes) + has_branches) as progress:
        for name, (context, lengths) in probes.items():
            layout, steps = _probe(candidate, context, lengths)
            expected, tokens = _decode_steps(reference, layout, [None] * steps)
            actual, _ = _decode_steps(candidate, layout, tokens)
            cases.append(compare(f"{name}, cached", expected, actual))
            progress.advance()
            whole = _extended(layout, tokens)
            one_pass = (forward(model.backend, whole, len(whole)) for model in (reference, candidate))
            cases.append(compare(f"{name}, one pass", *one_pass))
            progress.advance()
        if has_branches:
            cases.append(compare("batch of two, cached", *_batched(candidate, reference)))
            progress.advance()
    return cases


def _batched(candidate: Model, reference: Model) -> tuple[Floats, Floats]:
    """Logits of the reference, one probe after the other, and of the candidate for all probes in one batch.

    The batch is read in chunks that end at different slots.
    """
    layouts = [_probe(candidate, *probe)[0] for probe in PROBES.values()]
    expected = [forward(reference.backend, layout, len(layout)) for layout in layouts]
    backend = candidate.backend
    cache = batch_cache(backend, len(layouts))
    actual: list[list[Floats]] = [[] for _ in layouts]
    starts = [0] * len(layouts)
    for thirds in (2, 3):
        stops = [thirds * len(layout) // 3 for layout in layouts]
        spans = list(zip(starts, stops, strict=True))
        slots = [range(*span) for span in spans]
        for chunks, logits in zip(actual, forward_spans(backend, layouts, spans, cache, slots), strict=True):
            chunks.append(logits)
        starts = stops
    return np.concatenate(expected), np.concatenate([np.concatenate(chunks) for chunks in actual])


def _report(
    cases: Sequence[CaseParity], rtol: float | None, min_top1: float = MIN_TOP1, max_mean_kl: float = MAX_MEAN_KL
) -> ParityReport:
    def worst(name: str, pick: Callable[[list[float]], float] = np.max) -> float:
        """The largest of all cases, or the one that ``pick`` picks; numpy passes a NaN on, and a NaN never passes."""
        return float(pick([getattr(case, name) for case in cases]))

    if not cases:
        return ParityReport(rtol, min_top1, max_mean_kl, True, None, None, None, None, ())
    relative, top1, kl = worst("max_rel_diff"), worst("top1_agreement", np.min), worst("mean_kl")
    close = rtol is None or (worst("other_rel_diff") <= rtol and relative <= SENSITIVE * rtol)
    return ParityReport(
        rtol=rtol,
        min_top1=min_top1,
        max_mean_kl=max_mean_kl,
        passed=close and top1 >= min_top1 and kl <= max_mean_kl,
        max_abs_diff=worst("max_abs_diff"),
        max_rel_diff=relative,
        top1_agreement=top1,
        mean_kl=kl,
        cases=tuple(cases),
    )


def _probe(model: Model, context: int, lengths: Sequence[int]) -> tuple[Layout, int]:
    """Pseudo-random prompts of these lengths, and the number of steps to decode after them."""
    generator = np.random.default_rng(PROBE_SEED)
    share = min(1.0, model.manifest.context_length / PROBE_SPAN)

    def tokens(count: int) -> list[int]:
        ids: list[int] = generator.integers(0, model.manifest.vocab_size, int(count * share) or 1).tolist()
        return ids

    prompts = [tokens(count) for count in lengths]
    layout = build_layout(prompts, model.manifest.rope_2d, tokens(context) if context else None)
    return layout, int(STEPS * share) or 1


def _decode_steps(
    model: Model, layout: Layout, tokens: Sequence[Sequence[int] | None]
) -> tuple[Floats, list[list[int]]]:
    """Logits of the prompts and of every step, and the tokens fed; steps whose ``tokens`` are None feed greedy ones."""
    cache = model.backend.new_cache(len(layout) + len(layout.last) * len(tokens))
    logits = [forward(model.backend, layout, len(layout), cache)]
    newest = logits[0][list(layout.last)]
    fed: list[list[int]] = []
    for column in tokens:
        fed.append(newest.argmax(-1).tolist() if column is None else list(column))
        layout = layout.append(fed[-1])
        newest = forward(model.backend, layout, len(fed[-1]), cache)
        logits.append(newest)
    return np.concatenate(logits), fed


def _extended(layout: Layout, tokens: Sequence[Sequence[int]]) -> Layout:
    """``layout`` with further columns of tokens."""
    for column in tokens:
        layout = layout.append(column)
    return layout
