"""Whether an artifact has the positions of the training: frequencies, branch stride, alignment, rope settings."""

from collections.abc import Mapping
from typing import Any

from pos2d.families import Dimensions
from pos2d.runtime.opening.opened_model import OpenedModel
from pos2d.sources.checkpoints.rope import rope_settings
from pos2d.sources.checkpoints.weight_files import CONFIG
from pos2d.sources.stock_rope import still_frequencies
from pos2d.spec import BRANCH, Rope2DSpec, spans

# Sizes that a merge may change without changing what is computed.
MAY_DIFFER = ("tied", "vocab", "context_length")


def compare_positions(reference: OpenedModel, artifact: OpenedModel) -> str:
    """What is not as in the training, as a phrase; empty where positions are the same.

    ``reference`` has the base as its source. An artifact that has one branch of a model with 2D RoPE is judged by the
    model that it is a branch of.
    """
    expected = reference.manifest.rope_2d
    found = artifact.manifest.one_branch_of or artifact.manifest.rope_2d
    still = still_of(artifact)
    if expected.is_2d and not found.is_2d and still:
        turned = [number for number, axis in enumerate(expected.axes, 1) if axis != BRANCH]
        trained = [number for number in range(1, expected.num_frequencies + 1) if number not in turned]
        if still != trained:
            return f"frequencies {spans(still)} do not turn, and in the training those were {spans(trained)}"
        return ""
    return _frequencies(expected, found) or _settings(reference, artifact)


def _frequencies(expected: Rope2DSpec, found: Rope2DSpec) -> str:
    if expected.is_2d != found.is_2d:
        where = f"2D RoPE on frequencies {_ratio(expected if expected.is_2d else found)}"
        return (
            f"it has no 2D RoPE, the training had {where}" if expected.is_2d else f"it has {where}, the training none"
        )
    if expected.axes != found.axes:
        return f"its 2D RoPE is on frequencies {_ratio(found)}, that of the training on {_ratio(expected)}"
    if expected.is_2d and expected.branch_stride != found.branch_stride:
        return f"its branch stride is {found.branch_stride}, that of the training {expected.branch_stride}"
    if expected.is_2d and expected.align_to != found.align_to:
        return f"its prompts are aligned {found.align_to}, those of the training {expected.align_to}"
    return ""


def _ratio(spec: Rope2DSpec) -> str:
    share = len(spec.pair_indices) / spec.num_frequencies
    return f"{spans(spec.pair_indices)} (a ratio of {share:.3g})"


def still_of(artifact: OpenedModel) -> list[int]:
    """The frequencies of a plain model, counted from 1, that do not turn."""
    config = _config(artifact)
    return [] if config is None else still_frequencies(rope_settings(config, str(artifact.place / CONFIG)))


def _settings(reference: OpenedModel, artifact: OpenedModel) -> str:
    """How the rope settings in ``config.json`` differ from those of the base."""
    config = _config(artifact)
    assert reference.source is not None
    if config is None or artifact.manifest.one_branch_of is not None:
        return ""
    one = rope_settings(reference.source.base.config, "config.json of the base")
    other = rope_settings(config, str(artifact.place / CONFIG))
    return _first_difference(one, other, "in its rope settings ")


def compare_sizes(reference: OpenedModel, artifact: OpenedModel) -> str:
    """How the sizes of the layers differ from those of the base, as a phrase; the norm's epsilon is one of them."""
    assert reference.source is not None
    expected = reference.source.base.sizes
    if artifact.manifest.family != expected.family:
        return f"it is a {artifact.manifest.family} model, the base a {expected.family} model"
    config = _config(artifact)
    if config is not None:
        found = Dimensions.from_config(config, str(artifact.place / CONFIG))
    elif artifact.manifest.graph is not None:
        found = artifact.manifest.graph.sizes
    else:
        return ""
    names = [name for name in Dimensions.__dataclass_fields__ if name not in MAY_DIFFER]
    difference = _first_difference(
        {name: getattr(expected, name) for name in names}, {name: getattr(found, name) for name in names}, ""
    )
    if not difference and found.vocab < expected.vocab:
        difference = f"its vocabulary has {found.vocab} tokens instead of {reference.manifest.vocab_size}"
    return difference


def _first_difference(expected: Mapping[str, Any], found: Mapping[str, Any], place: str) -> str:
    for name in dict.fromkeys((*expected, *found)):
        if expected.get(name) != found.get(name):
            return f"{place}{name} is {found.get(name)} instead of {expected.get(name)}"
    return ""


def _config(artifact: OpenedModel) -> Mapping[str, Any] | None:
    """The configuration of a model on torch, with the family's own model type; None for a graph."""
    if artifact.source is not None:
        return artifact.source.base.config
    if artifact.manifest.kind == "onnx":
        return None
    from pos2d.sources.checkpoints.checkpoint import read_config

    return read_config(artifact.directory) | {"model_type": artifact.manifest.family}
