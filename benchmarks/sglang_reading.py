"""The rotary cosines and sines that SGLang computes from a ``config.json``, worked out here, since SGLang is not run.

Read from the published source of SGLang 0.5.23 (its wheel on PyPI): ``srt/models/{llama,qwen2,qwen3}.py`` (Mistral is a
Llama there), ``srt/layers/rotary_embedding/factory.py`` and the class for ``longrope`` in ``rope_variant.py``.

- The settings are ``rope_parameters`` of the configuration as transformers reads it, else ``rope_scaling``; theta is
  ``rope_theta`` in it, and for Llama 10000 where it is missing there. All heads turn whole.
- ``original_max_position_embeddings`` is read from the same block, else it is ``max_position_embeddings``; for Llama, a
  key of that name at the top of the configuration replaces it.
- Each frequency is ``1 / (factor * theta ** (2 i / d))`` in float32, of ``short_factor``, or of ``long_factor`` as soon
  as one position of a batch lies above the original length.
- ``attention_factor`` and ``factor`` are not read. Cosines and sines are multiplied by ``short_mscale`` or
  ``long_mscale``; where these are missing, by ``sqrt(1 + ln s / ln original)`` with ``s`` the length divided by the
  original one, which is 1 where ``s`` is at most 1.
- They are stored in the type of the model, as transformers does it.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pos2d.spec import BRANCH, Rope2DSpec

VERSION = "0.5.23"
Floats = npt.NDArray[np.float32]


def sglang_rope(config: Mapping[str, Any], settings: Mapping[str, Any], long: bool) -> tuple[Floats, float]:
    """Inverse frequencies, float32 ``[F]``, and the factor of cosines and sines, for ``longrope``.

    ``config`` has the sizes, and ``settings`` is the block of rope settings as transformers reads it. ``long``: a
    position lies above the original length.

    Raises:
        ValueError: another rope type.
    """
    if settings.get("rope_type", settings.get("type")) != "longrope":
        raise ValueError(f"rope type {settings.get('rope_type')!r} is not longrope")
    theta = settings.get("rope_theta", 10000)
    length = config["max_position_embeddings"]
    original = config.get("original_max_position_embeddings") or settings.get(
        "original_max_position_embeddings", length
    )
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    factors = torch.tensor(settings["long_factor" if long else "short_factor"], dtype=torch.float32)
    frequencies = 1.0 / (factors * theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    grown = length / original
    scale = 1.0 if grown <= 1 else math.sqrt(1 + math.log(grown) / math.log(original))
    return frequencies.numpy(), float(settings.get("long_mscale" if long else "short_mscale", scale))


def difference(
    config: Mapping[str, Any], settings: Mapping[str, Any], ours: tuple[Floats, float], spec: Rope2DSpec
) -> float:
    """The largest difference of SGLang's cosines and sines from ours in one branch, over all positions of the model.

    ``ours`` are the frequencies ``[F]`` of the model with 2D RoPE and its factor; in one branch those that turn with
    the branch stand still.
    """
    frequencies = np.where(np.array(spec.axes) == BRANCH, np.float32(0), ours[0])
    positions = np.arange(config["max_position_embeddings"], dtype=np.float32)[:, None]
    largest = 0.0
    for long in (False, True):
        theirs, scale = sglang_rope(config, settings, long)
        for turn in (np.cos, np.sin):
            found = turn(positions * theirs) * np.float32(scale) - turn(positions * frequencies) * np.float32(ours[1])
            largest = max(largest, float(np.abs(found).max()))
    return largest
