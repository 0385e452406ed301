"""What every verb that holds one artifact against another shares."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pos2d.errors import InputError
from pos2d.manifest import read_manifest
from pos2d.runtime.engine.backend import Floats

Doubles = npt.NDArray[np.float64]


def check_same_model(artifact: Path, reference: Path) -> None:
    """Read both manifests, before any weights.

    Raises:
        InputError: either is not an artifact, or they are not the same model.
    """
    manifests = [read_manifest(path) for path in (artifact, reference)]
    names = ("family", "vocab_size", "rope_2d", "adapters", "base")
    differing = [name for name in names if getattr(manifests[0], name) != getattr(manifests[1], name)]
    if differing:
        raise InputError(
            f"{artifact} and {reference} are not the same model: {', '.join(differing)} differ in their manifests"
        )


def log_softmax(logits: Floats) -> Doubles:
    """Natural logarithms of the probabilities, ``[..., V]`` to the same shape."""
    wide: Doubles = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide


def kl_divergence(expected: Doubles, found: Doubles) -> Doubles:
    """KL(expected || found) in nats, ``[...]`` of log-probabilities ``[..., V]``."""
    divergence: Doubles = (np.exp(expected) * (expected - found)).sum(-1)
    return divergence


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
