"""Distances between the logits of two artifacts of the same model."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pos2d.errors import InputError
from pos2d.hashing import sha256
from pos2d.manifest import Manifest
from pos2d.runtime.engine.backend import Floats
from pos2d.runtime.opening.opened_model import OpenedModel
from pos2d.spec import Rope2DSpec
from pos2d.text_files import read_text

# The files that hold a tokenizer itself, without its settings.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
# Keys of the first that every program which uses the tokenizer may change.
INCIDENTAL = ("truncation", "padding")
# Fields of manifests, besides positions: those of every model, and those that only artifacts record.
ALWAYS_SAME = ("family", "vocab_size", "context_length")
RECORDED = ("eos_token_ids", "adapters", "base")

Doubles = npt.NDArray[np.float64]


def check_same_model(model: OpenedModel, reference: OpenedModel) -> None:
    """Check that two artifacts have the same base, adapters, positions, end tokens and tokenizer.

    A plain model does not say where its weights come from, so only its shape, positions and tokenizer are compared.

    An artifact that has one branch of a model is compared with that model in the layouts of the artifact, which its
    reference computes as well.

    Raises:
        InputError: they are not the same model; a reference that has only one branch of the artifact.
    """
    is_recorded = model.source is None and reference.source is None
    trained = [_turned_by(opened.manifest, is_recorded) for opened in (model, reference)]
    if trained[0] == trained[1] and model.manifest.rope_2d.is_2d and not reference.manifest.rope_2d.is_2d:
        raise InputError(
            f"{reference.place} has only one branch of {model.place}; compare it with {model.place} instead"
        )
    manifests = (model.manifest, reference.manifest)
    differing = [name for name in ALWAYS_SAME if getattr(manifests[0], name) != getattr(manifests[1], name)]
    differing += ["rope_2d"] if trained[0] != trained[1] else []
    recorded = RECORDED if is_recorded else ()
    differing += [name for name in recorded if getattr(manifests[0], name) != getattr(manifests[1], name)]
    one, other = (_tokenizer_files(opened.directory) for opened in (model, reference))
    differing += [name for name in TOKENIZERS if name in one and name in other and one[name] != other[name]]
    if differing:
        raise InputError(f"{model.place} and {reference.place} are not the same model: {', '.join(differing)} differ")


def _turned_by(manifest: Manifest, is_recorded: bool) -> Rope2DSpec | int:
    """What the logits of a model depend on: without 2D RoPE neither stride nor alignment, but the frequencies alone.

    ``is_recorded``: one branch counts as the model that was trained, which only artifacts record.
    """
    spec = (manifest.one_branch_of if is_recorded else None) or manifest.rope_2d
    return spec if spec.is_2d else spec.num_frequencies


def _tokenizer_files(directory: Path) -> dict[str, object]:
    """What the tokenizer's files say, by name; how a program last padded and truncated does not belong to it."""
    found: dict[str, object] = {name: sha256(directory / name) for name in TOKENIZERS if (directory / name).is_file()}
    with suppress(OSError, ValueError, AttributeError):  # a damaged file is equal to its copies alone
        whole = json.loads(read_text(directory / TOKENIZERS[0]))
        found[TOKENIZERS[0]] = {key: value for key, value in whole.items() if key not in INCIDENTAL}
    return found


def log_softmax(logits: Floats) -> Doubles:
    """Log-probabilities in nats, float64 ``[..., V]``, from logits ``[..., V]``."""
    result: Doubles = logits.astype(np.float64)
    result -= result.max(-1, keepdims=True)
    result -= np.log(np.exp(result).sum(-1, keepdims=True))
    return result


def kl_divergence(expected: Doubles, actual: Doubles) -> Doubles:
    """KL(expected || actual) in nats, ``[...]``, from log-probabilities ``[..., V]``."""
    divergence: Doubles = (np.exp(expected) * (expected - actual)).sum(-1)
    return divergence


@dataclass(frozen=True, slots=True)
class CaseParity:
    """The distance between two sets of logits over ``positions`` tokens.

    ``max_rel_diff`` is ``max_abs_diff`` divided by the reference's largest logit, and ``other_rel_diff`` the same
    without the position that differs most. ``mean_kl`` is KL(reference || artifact) in nats per position.
    """

    name: str
    positions: int
    max_abs_diff: float
    max_rel_diff: float
    other_rel_diff: float
    top1_agreement: float
    mean_kl: float


def compare(name: str, expected: Floats, actual: Floats) -> CaseParity:
    """Compare logits ``[N, V]`` of the reference with those of the artifact."""
    by_position = np.sort(np.abs(expected - actual).max(-1))
    difference, largest = float(by_position[-1]), float(np.abs(expected).max())
    return CaseParity(
        name=name,
        positions=len(expected),
        max_abs_diff=difference,
        max_rel_diff=difference / largest,
        other_rel_diff=float(by_position[-2:][0]) / largest,
        top1_agreement=float((expected.argmax(-1) == actual.argmax(-1)).mean()),
        mean_kl=float(kl_divergence(log_softmax(expected), log_softmax(actual)).mean()),
    )
