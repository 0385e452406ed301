"""Hold an artifact against another of the same model: logits on one branch and on several, in one pass and cached."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pos2d.errors import ParityError, UsageError
from pos2d.layout import Layout, build_layout
from pos2d.manifest import read_manifest
from pos2d.progress import Progress
from pos2d.runtime.engine.backend import BatchBackend, Floats
from pos2d.runtime.engine.batch_decode import forward_spans
from pos2d.runtime.engine.decode import forward
from pos2d.runtime.evaluation.parity import CaseParity, check_same_model, compare
from pos2d.runtime.load import load
from pos2d.runtime.model.model import Model

DEFAULT_RTOL = 1e-3
MAX_MEAN_KL = 1e-6
MIN_TOP1 = 0.99
# Of a float16 graph, whose steps are a ten-thousandth of a value.
HALF_RTOL, HALF_MEAN_KL, HALF_TOP1 = 2e-2, 1e-4, 0.95
PROBE_SEED = 20240601
STEPS = 8
# Tokens of the context and of each branch; a model with less than PROBE_SPAN positions gets shorter ones.
PROBES = {"one branch": (0, (48,)), "four branches after a context": (24, (12, 7, 16, 9))}
PROBE_SPAN = 128


@dataclass(frozen=True, slots=True)
class ParityReport:
    """The worst of all cases, and each of them; ``rtol`` is absent of quantised artifacts, ``cure`` where it passed."""

    rtol: float | None
    min_top1: float
    max_mean_kl: float
    passed: bool
    max_abs_diff: float
    max_rel_diff: float
    top1_agreement: float
    mean_kl: float
    cases: tuple[CaseParity, ...]
    cure: str = ""

    def raise_if_failed(self) -> None:
        """Raises:
        ParityError: a figure is outside its tolerance.
        """
        if self.passed:
            return
        figures = (
            f"with a KL of {self.mean_kl:.0e} (at most {self.max_mean_kl:.0e}), and the top token agrees on "
            f"{self.top1_agreement:.1%} (at least {self.min_top1:.0%})"
        )
        if self.rtol is None:
            raise ParityError(
                f"rounding activations to 8 bits changes the logits, {figures}; export it again with {self.cure}"
            )
        raise ParityError(
            f"logits differ by up to {self.max_rel_diff:.1e} of the largest (tolerance {self.rtol:.0e}) {figures}; "
            "do not use this artifact"
        )


def verify(artifact: str | Path, against: str | Path | None = None, *, rtol: float = DEFAULT_RTOL) -> ParityReport:
    """Compare logits of ``artifact`` with those of ``against``, both computed in float32.

    A float16 graph computes in its own type and has wider limits. A quantised graph is meant to differ; it is compared
    with itself, but with float activations, on what it writes itself, and passes with a mean KL of at most 0.05 nats a
    position and the same top token on 90 % of them.

    The probes are fixed pseudo-random token ids; in the cached cases the reference's greedy tokens are fed to both, so
    every step compares the same sequence. It passes when every logit agrees within ``rtol`` times the largest one, the
    mean KL of every case is at most 1e-6 nats a position, and the top token agrees on at least 99 % of the positions.
    (Float32 kernels of two libraries differ by about 1e-5, and by 2e-4 at single positions that are sensitive.)

    Raises:
        InputError: either is not an artifact, or they are not the same model.
        UsageError: a tolerance that is not positive, a reference that is missing or quantised, or one for a quantised
            artifact.
    """
    if not rtol > 0:
        raise UsageError(f"rtol {rtol} must be above 0")
    if against is None:
        if rtol != DEFAULT_RTOL:
            raise UsageError("--rtol belongs to --against; rounded activations are judged by KL and top token")
        return _verify_activations(Path(artifact))
    for path in (artifact, against):
        manifest = read_manifest(Path(path))
        if manifest.quant is not None or manifest.graph_quant is not None:
            raise UsageError(f"{path} is quantised, so its logits differ; eval measures by how much that matters")
    check_same_model(Path(artifact), Path(against))
    candidate, reference = _load(Path(artifact)), _load(Path(against))
    cases: list[CaseParity] = []
    batch = isinstance(candidate.backend, BatchBackend)
    with Progress("verifying", 2 * len(PROBES) + batch) as progress:
        for name, (context, lengths) in PROBES.items():
            layout, steps = _probe(reference, context, lengths)
            expected, script = _stepwise(reference, layout, [None] * steps)
            found, _ = _stepwise(candidate, layout, script)
            cases.append(compare(f"{name}, cached", expected, found))
            progress.advance()
            whole = _extended(layout, script)
            one_pass = (forward(model.backend, whole, len(whole)) for model in (reference, candidate))
            cases.append(compare(f"{name}, one pass", *one_pass))
            progress.advance()
        if batch:
            cases.append(compare("batch of two, cached", *_batched(candidate, reference)))
            progress.advance()
    if candidate.manifest.dtype == "float16" and candidate.manifest.kind == "onnx":
        return _summary(cases, max(rtol, HALF_RTOL), HALF_TOP1, HALF_MEAN_KL)
    return _summary(cases, rtol)


def _load(path: Path) -> Model:
    """In float32, but for a graph, which has one type."""
    return load(path, device="cpu", dtype="auto" if read_manifest(path).kind == "onnx" else "float32")


def _verify_activations(artifact: Path) -> ParityReport:
    from pos2d.runtime.evaluation.activation_probe import MAX_MEAN_KL, MIN_TOP1, activation_cases

    if read_manifest(artifact).graph_quant is None:
        raise UsageError(f"{artifact} is compared with another artifact of the same model; name it with --against")
    cases, cure = activation_cases(artifact)
    report = _summary(cases, None, MIN_TOP1, MAX_MEAN_KL)
    return replace(report, cure=cure)


def _batched(candidate: Model, reference: Model) -> tuple[Floats, Floats]:
    """Logits of both probes at once, read in pieces that end at different slots, and of the reference one by one."""
    layouts = [_probe(reference, *probe)[0] for probe in PROBES.values()]
    expected = [forward(reference.backend, layout, len(layout)) for layout in layouts]
    backend = candidate.backend
    assert isinstance(backend, BatchBackend)
    cache = backend.new_batch_cache(len(layouts))
    found: list[list[Floats]] = [[] for _ in layouts]
    starts = [0] * len(layouts)
    for part in (2, 3):
        stops = [part * len(layout) // 3 for layout in layouts]
        wanted = [range(*span) for span in zip(starts, stops, strict=True)]
        spans = list(zip(starts, stops, strict=True))
        for pieces, logits in zip(found, forward_spans(backend, layouts, spans, cache, wanted), strict=True):
            pieces.append(logits)
        starts = stops
    return np.concatenate(expected), np.concatenate([np.concatenate(pieces) for pieces in found])


def _summary(
    cases: Sequence[CaseParity], rtol: float | None, min_top1: float = MIN_TOP1, max_mean_kl: float = MAX_MEAN_KL
) -> ParityReport:
    def worst(name: str, pick: Callable[[list[float]], float] = np.max) -> float:
        """The largest (or what ``pick`` says) of all cases; numpy keeps a NaN, which then fails every comparison."""
        return float(pick([getattr(case, name) for case in cases]))

    relative, top1, kl = worst("max_rel_diff"), worst("top1_agreement", np.min), worst("mean_kl")
    return ParityReport(
        rtol=rtol,
        min_top1=min_top1,
        max_mean_kl=max_mean_kl,
        passed=(rtol is None or relative <= rtol) and top1 >= min_top1 and kl <= max_mean_kl,
        max_abs_diff=worst("max_abs_diff"),
        max_rel_diff=relative,
        top1_agreement=top1,
        mean_kl=kl,
        cases=tuple(cases),
    )


def _probe(model: Model, context: int, lengths: Sequence[int]) -> tuple[Layout, int]:
    """Random prompts, and the number of steps to decode after them."""
    draw = np.random.default_rng(PROBE_SEED)
    share = min(1.0, model.manifest.context_length / PROBE_SPAN)

    def tokens(count: int) -> list[int]:
        ids: list[int] = draw.integers(0, model.manifest.vocab_size, int(count * share) or 1).tolist()
        return ids

    prompts = [tokens(count) for count in lengths]
    layout = build_layout(prompts, model.manifest.rope_2d, tokens(context) if context else None)
    return layout, int(STEPS * share) or 1


def _stepwise(model: Model, layout: Layout, script: Sequence[Sequence[int] | None]) -> tuple[Floats, list[list[int]]]:
    """Logits of the prompts and of every step, and the tokens fed: of ``script``, or greedy where it has none."""
    cache = model.backend.new_cache(len(layout) + len(layout.last) * len(script))
    logits = [forward(model.backend, layout, len(layout), cache)]
    newest = logits[0][list(layout.last)]
    fed: list[list[int]] = []
    for tokens in script:
        fed.append(newest.argmax(-1).tolist() if tokens is None else list(tokens))
        layout = layout.append(fed[-1])
        newest = forward(model.backend, layout, len(fed[-1]), cache)
        logits.append(newest)
    return np.concatenate(logits), fed


def _extended(layout: Layout, script: Sequence[Sequence[int]]) -> Layout:
    for tokens in script:
        layout = layout.append(tokens)
    return layout
