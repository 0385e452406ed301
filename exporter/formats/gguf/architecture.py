"""Which graph of llama.cpp computes a model, and the numbers that the graph takes.

In one branch a model with 2D RoPE is an ordinary one whose branch frequencies never turn. llama.cpp's graph ``llama``
divides every frequency by a factor of the tensor ``rope_freqs.weight``, so a factor that is large enough stops one; the
same factors hold whatever else scales the frequencies. Its graphs ``qwen2`` and ``qwen3`` have no such tensor.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pos2d.errors import InputError
from pos2d.families import Dimensions
from pos2d.sources.checkpoints.rope import rope_settings
from pos2d.sources.checkpoints.weight_files import CONFIG
from pos2d.sources.hf_config import rotary_frequencies
from pos2d.sources.source import Source
from pos2d.sources.stock_rope import STILL, frequency_powers
from pos2d.spec import BRANCH

if TYPE_CHECKING:
    from gguf import GGUFWriter

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True, eq=False)
class Architecture:
    """A graph of llama.cpp, by its ``name``, and the rotary embedding of a model in it.

    ``neighbours``: a rotation turns neighbouring values of a head, where transformers turns the two halves of it, so
    that the rows of q and k change places. Frequency ``i`` of ``F`` is ``theta ** (-i / F)``, divided by ``factors[i]``
    (float32 ``[F]``) where there are any. ``scaling`` multiplies cosines and sines.
    """

    name: str
    neighbours: bool
    theta: float
    factors: Floats | None
    scaling: float


def choose_architecture(source: Source, tied: bool) -> Architecture:
    """The graph in which llama.cpp computes ``source``, or one branch of it.

    Raises:
        InputError: a Qwen3 whose rotary embedding or biases llama.cpp's graph for it does not have.
    """
    sizes, spec = source.base.sizes, source.spec
    settings = rope_settings(source.base.config, str(source.base.directory / CONFIG))
    theta = float(settings["rope_theta"])
    frequencies, scaling = rotary_frequencies(source.base, spec, tied)
    still = np.array([axis == BRANCH for axis in spec.axes]) | (frequencies == 0)
    quotients = (1 / frequency_powers(theta, len(still))) / np.where(still, np.float32(1), frequencies)
    factors = np.where(still, np.float32(STILL), np.minimum(quotients, np.float32(STILL))).astype(np.float32)
    is_plain = bool((factors == 1).all()) and scaling == 1
    if sizes.family == "qwen3":
        _refuse_qwen3(source, is_plain, str(settings["rope_type"]))
    # The graph qwen2 wants queries as wide as the hidden state.
    own_graph = sizes.family == "qwen3" or (
        sizes.family == "qwen2" and is_plain and sizes.heads * sizes.head_dim == sizes.hidden
    )
    return Architecture(
        name=sizes.family if own_graph else "llama",
        neighbours=not own_graph,
        theta=theta,
        factors=None if (factors == 1).all() else factors,
        scaling=scaling,
    )


def _refuse_qwen3(source: Source, is_plain: bool, rope_type: str) -> None:
    path = source.base.directory / CONFIG
    cure = "`format='stock'` keeps it, for transformers and vLLM"
    if source.spec.is_2d:
        raise InputError(
            f"{path}: llama.cpp has no place for 2D RoPE in a Qwen3: its graph for Qwen3 takes no factors of the "
            f"frequencies, and its graph that takes them has no norm of queries and keys; {cure}"
        )
    if not is_plain:
        raise InputError(
            f"{path}: llama.cpp's graph for Qwen3 takes no factors of the frequencies, which rope type {rope_type!r} "
            f"needs; {cure}"
        )
    if source.base.sizes.output_bias:
        raise InputError(f"{path}: llama.cpp's graph for Qwen3 has no attention_bias; {cure}")


def row_places(rows: int, head_dim: int) -> Ints:
    """Where each row of q or k is stored in a graph that turns neighbours: int64 ``[rows]``.

    Row ``j`` of the first half of a head goes to place ``2 j`` of that head, and of the second half to ``2 j + 1``.
    """
    half = head_dim // 2
    order = np.arange(rows, dtype=np.int64)
    within = order % head_dim
    return order - within + 2 * (within % half) + within // half


def add_settings(writer: "GGUFWriter", sizes: Dimensions, architecture: Architecture) -> None:
    """Write the numbers that llama.cpp's graph takes."""
    writer.add_vocab_size(sizes.vocab)
    writer.add_context_length(sizes.context_length)
    writer.add_embedding_length(sizes.hidden)
    writer.add_block_count(sizes.layers)
    writer.add_feed_forward_length(sizes.intermediate)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_rope_dimension_count(sizes.head_dim)
    writer.add_rope_freq_base(architecture.theta)
    writer.add_layer_norm_rms_eps(sizes.norm_eps)
    if architecture.scaling != 1:
        writer.add_rope_scaling_attn_factors(architecture.scaling)
