"""What rounding activations to 8 bits does to a quantised graph: it is compared with itself with float activations.

Some models have single features that are hundreds of times larger than all others (Qwen3-0.6B, onnxruntime issue
29849); all other inputs in the block of such a feature are then rounded to zero.
"""

from collections.abc import Collection, Sequence

import numpy as np

from pos2d.layout import Layout, build_layout
from pos2d.onnx_io import LINEAR_KINDS
from pos2d.progress import Progress
from pos2d.recipes import GraphRecipe
from pos2d.reference import ONE_BRANCH
from pos2d.runtime.backends.onnx.backend import OnnxBackend
from pos2d.runtime.engine.backend import Floats
from pos2d.runtime.engine.decode import decode, forward
from pos2d.runtime.engine.sampler import Sampler
from pos2d.runtime.engine.sampling import Sampling
from pos2d.runtime.evaluation.parity import CaseParity, compare
from pos2d.runtime.model.model import Model

SEED = 20240601
# Branches and new tokens of each probe; models with few positions get shorter ones.
PROBES = {ONE_BRANCH: (1, 96), "four branches": (4, 24)}
MOST_BRANCHES = max(branches for branches, _ in PROBES.values())
MAX_MEAN_KL = 0.05
MIN_TOP1 = 0.9


def compare_activations(model: Model) -> tuple[list[CaseParity], str]:
    """Compare a quantised graph with itself with float activations; the second value says how to export it instead.

    It names parameters of ``export``, and is empty if the graph passes. A probe is text that the model itself samples,
    because its activations then have the magnitudes that they have in use.
    """
    recipe = model.manifest.graph_quant
    assert isinstance(model.backend, OnnxBackend)
    assert recipe is not None
    probes = PROBES if model.manifest.has_branches else {ONE_BRANCH: PROBES[ONE_BRANCH]}
    layouts = [_sampled_layout(model, *probe) for probe in probes.values()]
    rounded = _logits(model.backend, layouts)
    model.backend.graphs.release()
    with Progress("verifying activations", 1) as progress:
        exact = _logits(model.backend.with_float_activations(LINEAR_KINDS), layouts)
        progress.advance()
    cases = _compare_probes(exact, rounded)
    return cases, "" if passes(cases) else _cure(model.backend, recipe, layouts, exact)


def passes(cases: Collection[CaseParity]) -> bool:
    return all(case.mean_kl <= MAX_MEAN_KL and case.top1_agreement >= MIN_TOP1 for case in cases)


def _cure(backend: OnnxBackend, recipe: GraphRecipe, layouts: Sequence[Layout], exact: Sequence[Floats]) -> str:
    """The parameters of ``export`` that give float activations to as few kinds of layers as needed.

    The most sensitive kinds come first: those that leave the smallest distance when they alone have float activations.
    """
    kl = {kind: _try_float_activations(backend, [kind], layouts, exact)[1] for kind in LINEAR_KINDS}
    kinds: list[str] = []
    for kind in sorted(LINEAR_KINDS, key=lambda kind: kl[kind]):
        kinds.append(kind)
        if _try_float_activations(backend, kinds, layouts, exact)[0]:
            break
    # Eight bits with float activations are very slow, so such layers are not quantised at all.
    in_8_bits = [kind for kind in kinds if any(name.endswith(kind) and bits == 8 for name, bits in recipe.bits.items())]
    # Parameters that are given again replace the former ones, so these include what the artifact was exported with.
    already_float = {kind for kind in LINEAR_KINDS if any(name.endswith(kind) for name in recipe.float_activations)}
    already_skipped = {kind for kind in LINEAR_KINDS if not any(name.endswith(kind) for name in recipe.bits)}
    parameters = {
        "float_activations": already_float | (set(kinds) - set(in_8_bits)),
        "skip_modules": already_skipped | set(in_8_bits),
    }
    return " and ".join(
        f"`{name}='{','.join(kind for kind in LINEAR_KINDS if kind in chosen)}'`"
        for name, chosen in parameters.items()
        if chosen
    )


def _try_float_activations(
    backend: OnnxBackend, kinds: Collection[str], layouts: Sequence[Layout], exact: Sequence[Floats]
) -> tuple[bool, float]:
    """Whether the graph passes with float activations in ``kinds`` alone, and its largest mean KL."""
    cases = _compare_probes(exact, _logits(backend.with_float_activations(kinds), layouts))
    return passes(cases), max(case.mean_kl for case in cases)


def _compare_probes(expected: Sequence[Floats], actual: Sequence[Floats]) -> list[CaseParity]:
    return [
        compare(f"{name}, rounded activations", *pair)
        for name, *pair in zip(list(PROBES)[: len(expected)], expected, actual, strict=True)
    ]


def _logits(backend: OnnxBackend, layouts: Sequence[Layout]) -> list[Floats]:
    """Logits of every token of each layout, in one pass per layout; all go through the general graph."""
    backend.expect_branches(MOST_BRANCHES)
    return [forward(backend, layout, len(layout)) for layout in layouts]


def _sampled_layout(model: Model, branches: int, tokens: int) -> Layout:
    """What the model samples after random first tokens, with ``branches`` side by side."""
    count = max(1, min(tokens, model.manifest.context_length // (2 * branches)))
    first = np.random.default_rng(SEED).integers(0, model.manifest.vocab_size, branches).tolist()
    layout = build_layout([[token] for token in first], model.manifest.rope_2d)
    options = Sampling(max_new_tokens=count, temperature=1.0, seed=SEED)
    writers = [Sampler(options, (branch,), (), [token]) for branch, token in enumerate(first)]
    model.backend.expect_branches(MOST_BRANCHES)
    for column in decode(model.backend, layout, writers, context_length=model.manifest.context_length):
        layout = layout.append(column.tokens)
    return layout
