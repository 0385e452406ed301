"""Hold an artifact against another of the same model: logits on one branch and on several, in one pass and cached."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pos2d.errors import ParityError, UsageError
from pos2d.layout import Layout, build_layout
from pos2d.manifest import read_manifest
from pos2d.progress import Progress
from runtime.backend import Floats
from runtime.comparison import check_same_model, kl_divergence, log_softmax
from runtime.engine import forward
from runtime.load import load
from runtime.model import Model

DEFAULT_RTOL = 1e-3
MAX_MEAN_KL = 1e-6
MIN_TOP1 = 0.99
PROBE_SEED = 20240601
STEPS = 8
# Tokens of the context and of each branch; a model with less than PROBE_SPAN positions gets shorter ones.
PROBES = {"one branch": (0, (48,)), "four branches after a context": (24, (12, 7, 16, 9))}
PROBE_SPAN = 128


@dataclass(frozen=True, slots=True)
class CaseParity:
    """One way of running a probe.

    ``max_rel_diff`` is ``max_abs_diff`` as a share of the reference's largest logit; ``mean_kl`` is
    KL(reference || artifact) in nats a position.
    """

    name: str
    positions: int
    max_abs_diff: float
    max_rel_diff: float
    top1_agreement: float
    mean_kl: float


@dataclass(frozen=True, slots=True)
class ParityReport:
    """The worst of all cases, and each of them."""

    rtol: float
    min_top1: float
    max_mean_kl: float
    passed: bool
    max_abs_diff: float
    max_rel_diff: float
    top1_agreement: float
    mean_kl: float
    cases: tuple[CaseParity, ...]

    def raise_if_failed(self) -> None:
        """Raises:
        ParityError: a figure is outside its tolerance.
        """
        if not self.passed:
            raise ParityError(
                f"logits differ by up to {self.max_rel_diff:.1e} of the largest (tolerance {self.rtol:.0e}) "
                f"with a KL of {self.mean_kl:.0e} (at most {self.max_mean_kl:.0e}), and the top token agrees on "
                f"{self.top1_agreement:.1%} (at least {self.min_top1:.0%}); do not use this artifact"
            )


def verify(artifact: str | Path, against: str | Path, *, rtol: float = DEFAULT_RTOL) -> ParityReport:
    """Compare logits of ``artifact`` with those of ``against``, both computed in float32.

    The probes are fixed pseudo-random token ids; in the cached cases the reference's greedy tokens are fed to both, so
    every step compares the same sequence. It passes when every logit agrees within ``rtol`` times the largest one, the
    mean KL of every case is at most 1e-6 nats a position, and the top token agrees on at least 99 % of the positions.
    (Float32 kernels of two libraries differ by about 1e-5, and by 2e-4 at single positions that are sensitive.)

    Raises:
        InputError: either is not an artifact, or they are not the same model.
        UsageError: a tolerance that is not positive, or a quantised artifact, which is meant to differ.
    """
    if not rtol > 0:
        raise UsageError(f"rtol {rtol} must be above 0")
    for path in (artifact, against):
        if read_manifest(Path(path)).quant is not None:
            raise UsageError(f"{path} is quantised, so its logits differ; eval measures by how much that matters")
    check_same_model(Path(artifact), Path(against))
    candidate, reference = (load(path, device="cpu", dtype="float32") for path in (artifact, against))
    cases: list[CaseParity] = []
    with Progress("verifying", 2 * len(PROBES)) as progress:
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
    return _summary(cases, rtol)


def compare(name: str, expected: Floats, found: Floats) -> CaseParity:
    """Logits ``[N, V]`` of the reference and of the artifact."""
    p, q = log_softmax(expected), log_softmax(found)
    difference = float(np.abs(expected - found).max())
    return CaseParity(
        name=name,
        positions=len(expected),
        max_abs_diff=difference,
        max_rel_diff=difference / float(np.abs(expected).max()),
        top1_agreement=float((expected.argmax(-1) == found.argmax(-1)).mean()),
        mean_kl=float(kl_divergence(p, q).mean()),
    )


def _summary(cases: Sequence[CaseParity], rtol: float) -> ParityReport:
    def worst(name: str, pick: Callable[[list[float]], float] = np.max) -> float:
        """The largest (or what ``pick`` says) of all cases; numpy keeps a NaN, which then fails every comparison."""
        return float(pick([getattr(case, name) for case in cases]))

    relative, top1, kl = worst("max_rel_diff"), worst("top1_agreement", np.min), worst("mean_kl")
    return ParityReport(
        rtol=rtol,
        min_top1=MIN_TOP1,
        max_mean_kl=MAX_MEAN_KL,
        passed=relative <= rtol and top1 >= MIN_TOP1 and kl <= MAX_MEAN_KL,
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
