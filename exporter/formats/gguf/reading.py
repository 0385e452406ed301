"""Reads a GGUF file back, and compares all of it with what it was written from."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pos2d.errors import ParityError
from pos2d.exporter.formats.gguf.architecture import ROPE_FACTORS, Architecture, row_places
from pos2d.exporter.formats.gguf.vocabulary import Vocabulary
from pos2d.exporter.formats.gguf.weights import GgufTensor
from pos2d.progress import Progress
from pos2d.recipes import GGUF_BLOCK
from pos2d.sources.checkpoints.checkpoint import HEAD
from pos2d.sources.files.parallel import single_threaded_torch, submitted, worker_count
from pos2d.sources.files.tensor_io import TensorFile, opened
from pos2d.sources.hf_config import rotary_frequencies
from pos2d.sources.source import Source
from pos2d.sources.tensors.exact_rows import exact_rows
from pos2d.spec import BRANCH

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader, ReaderTensor

# By type: the largest error of a value in parts of the value itself, and in parts of the largest one of its block. The
# scale of a block is float16, so that it is off by up to 2 ** -11; Q4_0 has one more step on one side of zero.
HALF_STEP = 2.0**-11
BOUNDS = {
    "F32": (2.0**-24, 0.0),
    "F16": (HALF_STEP, 0.0),
    "BF16": (2.0**-8, 0.0),
    "Q8_0": (HALF_STEP, 0.501 / 127),
    "Q4_0": (HALF_STEP, 1.001 / 8),
}
# The smallest steps of float16, alone and in a scale.
SMALLEST = {"F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133, "Q8_0": 127 * 2.0**-24, "Q4_0": 8 * 2.0**-24}
FREQUENCY_ERROR = 2.0**-22
# A frequency that turns by less at a position never turns.
NEVER = 1e-29


def compare_file(
    path: Path,
    source: Source,
    tensors: tuple[GgufTensor, ...],
    architecture: Architecture,
    vocabulary: Vocabulary | None,
) -> Mapping[str, Any]:
    """Compare the file at ``path`` with the model of ``source``.

    Returns how many tensors were compared, and the largest error in parts of what the type of its tensor may be off by.

    Raises:
        ParityError: they differ by more than rounding.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    faults = [*_settings_faults(reader, source, architecture, vocabulary)]
    faults += _frequency_faults(stored, source, architecture, tensors)
    expected = {tensor.name for tensor in tensors} | ({ROPE_FACTORS} if architecture.factors is not None else set())
    faults += [f"tensor {name}" for name in sorted(expected ^ set(stored))]
    worst = 0.0
    if not faults:
        for tensor, error in _errors(stored, source, tensors):
            worst = max(worst, error)
            if not error <= 1:
                faults.append(f"tensor {tensor.name}, {error:.3g} times as far off as {tensor.kind} rounds")
    if faults:
        raise ParityError(
            f"{path.name} does not have what it was written from: {'; '.join(faults[:3])}; no artifact was written"
        )
    return {"tensors": len(tensors), "max_error": worst}


def _settings_faults(
    reader: "GGUFReader", source: Source, architecture: Architecture, vocabulary: Vocabulary | None
) -> Iterator[str]:
    sizes, prefix = source.base.sizes, architecture.name
    wanted: dict[str, Any] = {
        "general.architecture": prefix,
        f"{prefix}.block_count": sizes.layers,
        f"{prefix}.embedding_length": sizes.hidden,
        f"{prefix}.feed_forward_length": sizes.intermediate,
        f"{prefix}.attention.head_count": sizes.heads,
        f"{prefix}.attention.head_count_kv": sizes.kv_heads,
        f"{prefix}.attention.key_length": sizes.head_dim,
        f"{prefix}.rope.dimension_count": sizes.head_dim,
        f"{prefix}.rope.freq_base": float(np.float32(architecture.theta)),
        f"{prefix}.attention.layer_norm_rms_epsilon": float(np.float32(sizes.norm_eps)),
        f"{prefix}.context_length": sizes.context_length,
        f"{prefix}.vocab_size": sizes.vocab,
    }
    if architecture.scaling != 1:
        wanted[f"{prefix}.rope.scaling.attn_factor"] = float(np.float32(architecture.scaling))
    if vocabulary is not None:
        wanted["tokenizer.ggml.pre"] = vocabulary.splitting.pre
        wanted["tokenizer.ggml.tokens"] = list(vocabulary.tokens)
        wanted["tokenizer.ggml.token_type"] = list(vocabulary.types)
        wanted["tokenizer.ggml.add_bos_token"] = vocabulary.first
        if vocabulary.merges:
            wanted["tokenizer.ggml.merges"] = list(vocabulary.merges)
        if vocabulary.template is not None:
            wanted["tokenizer.chat_template"] = vocabulary.template
        for name, key in (("bos", "bos"), ("eos", "eos"), ("eot", "eot"), ("eom", "eom")):
            if name in vocabulary.ids:
                wanted[f"tokenizer.ggml.{key}_token_id"] = vocabulary.ids[name]
    for key, value in wanted.items():
        field = reader.get_field(key)
        if field is None or field.contents() != value:
            yield f"setting {key}"


def _frequency_faults(
    stored: "Mapping[str, ReaderTensor]", source: Source, architecture: Architecture, tensors: tuple[GgufTensor, ...]
) -> Iterator[str]:
    """Compare the frequencies that llama.cpp will turn with, from what is stored, with those of the model."""
    count = source.base.sizes.num_frequencies
    tied = not any(tensor.tensor.name == HEAD for tensor in tensors)
    turning, _ = rotary_frequencies(source.base, source.spec, tied)
    expected = np.where(np.array(source.spec.axes) == BRANCH, 0, turning)
    factors = np.array(stored[ROPE_FACTORS].data) if ROPE_FACTORS in stored else np.ones(count, np.float32)
    plain = architecture.theta ** (-np.arange(count) / count)
    for index, (found, wanted) in enumerate(zip(plain / factors, expected, strict=True), 1):
        if abs(found - wanted) > FREQUENCY_ERROR * wanted + NEVER:
            yield f"frequency {index}"


def _errors(
    stored: "Mapping[str, ReaderTensor]", source: Source, tensors: tuple[GgufTensor, ...]
) -> Iterator[tuple[GgufTensor, float]]:
    """Every tensor with its largest error, in parts of what its type may be off by."""
    with (
        Progress("comparing weights", sum(tensor.nbytes for tensor in tensors), unit="bytes") as progress,
        opened(source.base.directory, {tensor.tensor.source.file for tensor in tensors}) as files,
        ThreadPoolExecutor(worker_count()) as workers,
        single_threaded_torch(),
    ):
        head_dim = source.base.sizes.head_dim
        jobs = (
            (tensor, files[tensor.tensor.source.file], stored[tensor.name], head_dim, progress) for tensor in tensors
        )
        with submitted(workers, _error, jobs) as errors:
            yield from zip(tensors, errors, strict=True)


def _error(tensor: GgufTensor, file: TensorFile, stored: "ReaderTensor", head_dim: int, progress: Progress) -> float:
    import torch
    from gguf import quants

    rows = tensor.tensor.shape[0]
    places = row_places(rows, head_dim) if tensor.rearranged else np.arange(rows)
    width = tensor.tensor.shape[1] if len(tensor.tensor.shape) > 1 else 1
    if stored.tensor_type.name != tensor.kind or stored.n_elements != rows * width:
        return np.inf
    data = stored.data.reshape(rows, -1)
    worst = 0.0
    for block in exact_rows(tensor.tensor, file):
        found = quants.dequantize(np.ascontiguousarray(data[places[block.rows]]), stored.tensor_type)
        exact = block.exact.reshape(-1, width)
        off = (torch.from_numpy(found.reshape(-1, width)).double() - exact).abs()
        worst = max(worst, float((off / _allowed(exact, tensor.kind)).max()))
        progress.advance(len(exact) * tensor.row_bytes)
    return worst


def _allowed(exact: "torch.Tensor", kind: str) -> "torch.Tensor":
    """By how much each value may be off, ``[n, in]``."""
    of_value, of_block = BOUNDS[kind]
    allowed = exact.abs() * of_value + SMALLEST[kind]
    if of_block:
        blocks = exact.abs().reshape(len(exact), -1, GGUF_BLOCK).amax(-1, keepdim=True) * (of_block + HALF_STEP)
        allowed = allowed + blocks.expand(-1, -1, GGUF_BLOCK).reshape(exact.shape)
    return allowed
