"""The rope settings with which a stock model computes one branch of a model with 2D RoPE.

In one branch all branch values are 0 and times equal positions. So the branch frequencies never turn, and the model is
an ordinary one whose other frequencies are those of the base: rope type ``longrope``, which has a factor for each
frequency, says that in the configurations of every family.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pos2d.spec import BRANCH, Rope2DSpec

Floats = npt.NDArray[np.float32]

# Divides a frequency, so that no type tells from 0 what it turns by at any position that a model has. It is finite in
# float32 and bfloat16, also times the powers of every usual theta, so that no reader meets an infinity.
STILL = 1e30
# Decimal digits that tell all numbers of float32 apart.
DIGITS = 9
# How many numbers of float32 on each side of a quotient are tried: its three roundings move it by less.
NEIGHBOURS = 4


def one_branch_rope(inv_freq: Floats, scaling: float, theta: float, length: int, spec: Rope2DSpec) -> dict[str, Any]:
    """The block ``rope_scaling`` of a stock model that computes what a model with ``spec`` computes in one branch.

    ``inv_freq`` float32 ``[F]`` are the frequencies of the model and ``scaling`` the factor of its cosines and sines,
    both with the base's own rope settings folded in. ``theta`` stays the base's, and ``length`` is the number of
    positions that the configuration states. transformers takes from the block exactly these frequencies, or the nearest
    that its formula ``1 / (factor * theta ** (2 i / d))`` reaches in float32, one unit in the last place away.
    """
    powers = frequency_powers(theta, len(inv_freq))
    factors = [
        STILL if axis == BRANCH else _factor(frequency, power)
        for axis, frequency, power in zip(spec.axes, inv_freq, powers, strict=True)
    ]
    block: dict[str, Any] = {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": scaling,
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": length,
    }
    return block | scale_keys(block)


def scale_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of their own from which vLLM and SGLang read the factor of cosines and sines of rope type ``longrope``.

    ``settings`` are those that transformers reads. Empty for other types, and where the factor is 1.
    """
    scaling = settings["attention_factor"] if settings["rope_type"] == "longrope" else 1
    return {"short_mscale": scaling, "long_mscale": scaling} if scaling != 1 else {}


def still_frequencies(settings: Mapping[str, Any]) -> list[int]:
    """The frequencies, counted from 1, that do not turn in a model that is itself one branch.

    ``settings`` are those of :func:`pos2d.sources.checkpoints.rope.rope_settings`.
    """
    return [index for index, factor in enumerate(settings.get("short_factor", ()), 1) if factor >= STILL]


def frequency_powers(theta: float, count: int) -> Floats:
    """``theta ** (2 i / d)``, float32 ``[F]``, by the very operations of transformers."""
    import torch

    exponents = torch.arange(0, 2 * count, 2, dtype=torch.int64).float() / (2 * count)
    powers: Floats = (theta**exponents).numpy()
    return powers


def _factor(frequency: np.float32, power: np.float32) -> float:
    """The shortest of the numbers ``x`` with which ``1 / (x * power)`` is the frequency, or is closest to it."""
    if frequency == 0:
        return STILL
    quotient = 1 / (float(frequency) * float(power))
    return min(_candidates(quotient), key=lambda factor: _distance(factor, frequency, power))


def _candidates(quotient: float) -> Iterator[float]:
    """Numbers close to a quotient, those of fewer digits first."""
    yield from (float(f"{quotient:.{digits}g}") for digits in range(1, DIGITS + 1))
    below = above = np.float32(quotient)
    for _ in range(NEIGHBOURS):
        below, above = np.nextafter(below, np.float32(0)), np.nextafter(above, np.float32(np.inf))
        yield from (float(f"{number:.{DIGITS}g}") for number in (below, above))


def _distance(factor: float, frequency: np.float32, power: np.float32) -> float:
    found = np.float32(1) / (np.float32(factor) * power)
    return abs(float(found) - float(frequency))
