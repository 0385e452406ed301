"""What rounding activations to 8 bits does to a quantised graph: the graph held against itself with float activations.

Some models have single features that are hundreds of times larger than all others (Qwen3-0.6B, onnxruntime issue
29849); the inputs that share a block with one are then rounded away.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from pos2d.graph_recipe import GraphRecipe
from pos2d.layout import Layout, build_layout
from pos2d.progress import Progress
from pos2d.runtime.backends.onnx.backend import OnnxBackend
from pos2d.runtime.backends.onnx.float_activations import KINDS
from pos2d.runtime.engine.backend import Floats
from pos2d.runtime.engine.decode import decode, forward
from pos2d.runtime.engine.sampler import Sampler
from pos2d.runtime.engine.sampling import Sampling
from pos2d.runtime.evaluation.parity import CaseParity, compare
from pos2d.runtime.load import load
from pos2d.runtime.model.model import Model

SEED = 20240601
# Branches and tokens of each probe, of a model with that many positions.
PROBES = {"one branch": (1, 96), "four branches": (4, 24)}
MAX_MEAN_KL = 0.05
MIN_TOP1 = 0.9


def activation_cases(artifact: Path) -> tuple[list[CaseParity], str]:
    """The figures of every probe, and the flag with which an export passes, where it does not.

    A probe is what the model itself writes, drawn at random: that is where its activations are as in use.
    """
    model = load(artifact)
    recipe = model.manifest.graph_quant
    assert isinstance(model.backend, OnnxBackend)
    assert recipe is not None
    layouts = [_written(model, *probe) for probe in PROBES.values()]
    rounded = _logits(model.backend, layouts)
    model.backend.graphs.release()
    with Progress("verifying activations", 1) as progress:
        exact = _logits(model.backend.with_float_activations(KINDS), layouts)
        progress.advance()
    cases = _cases(exact, rounded)
    return cases, "" if passed(cases) else _cure(model.backend, recipe, layouts, exact)


def passed(cases: Collection[CaseParity]) -> bool:
    return all(case.mean_kl <= MAX_MEAN_KL and case.top1_agreement >= MIN_TOP1 for case in cases)


def _cure(backend: OnnxBackend, recipe: GraphRecipe, layouts: Sequence[Layout], exact: Sequence[Floats]) -> str:
    """The fewest kinds of layers, the most sensitive first, that need float activations."""
    distance = {kind: _distance(backend, [kind], layouts, exact) for kind in KINDS}
    kinds: list[str] = []
    for kind in sorted(KINDS, key=lambda kind: distance[kind][1]):
        kinds.append(kind)
        if _distance(backend, kinds, layouts, exact)[0]:
            break
    wide = [kind for kind in kinds if any(m.endswith(kind) and bits == 8 for m, bits in recipe.bits.items())]
    # With what the artifact has already: flags that are given anew replace the old ones.
    floating = {kind for kind in KINDS if any(module.endswith(kind) for module in recipe.float_activations)}
    skipped = {kind for kind in KINDS if not any(module.endswith(kind) for module in recipe.bits)}
    flags = (
        ("--float-activations", floating | (set(kinds) - set(wide))),
        ("--skip-modules", skipped | set(wide)),
    )
    return " ".join(f"{flag} {','.join(kind for kind in KINDS if kind in names)}" for flag, names in flags if names)


def _distance(
    backend: OnnxBackend, kinds: Collection[str], layouts: Sequence[Layout], exact: Sequence[Floats]
) -> tuple[bool, float]:
    """Whether a graph with float activations in ``kinds`` alone passes, and its KL."""
    cases = _cases(exact, _logits(backend.with_float_activations(kinds), layouts))
    return passed(cases), max(case.mean_kl for case in cases)


def _cases(expected: Sequence[Floats], found: Sequence[Floats]) -> list[CaseParity]:
    return [compare(f"{name}, rounded activations", *pair) for name, *pair in zip(PROBES, expected, found, strict=True)]


def _logits(backend: OnnxBackend, layouts: Sequence[Layout]) -> list[Floats]:
    """Of every token, all in one pass; every probe goes through the general graph."""
    backend.expect_branches(max(branches for branches, _ in PROBES.values()))
    return [forward(backend, layout, len(layout)) for layout in layouts]


def _written(model: Model, branches: int, tokens: int) -> Layout:
    """What the model writes from random first tokens, side by side."""
    count = max(1, min(tokens, model.manifest.context_length // (2 * branches)))
    first = np.random.default_rng(SEED).integers(0, model.manifest.vocab_size, branches).tolist()
    layout = build_layout([[token] for token in first], model.manifest.rope_2d)
    options = Sampling(max_new_tokens=count, temperature=1.0, seed=SEED)
    writers = [Sampler(options, (branch,), (), [token]) for branch, token in enumerate(first)]
    model.backend.expect_branches(max(branches for branches, _ in PROBES.values()))
    for column in decode(model.backend, layout, writers, context_length=model.manifest.context_length):
        layout = layout.append(column.tokens)
    return layout
