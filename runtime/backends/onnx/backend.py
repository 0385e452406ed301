"""ONNX artifacts on ONNX Runtime, driven by the inputs and outputs that the manifest names."""

from collections.abc import Collection
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from pos2d.errors import InputError, UsageError
from pos2d.footprint import GRAPH_ROWS
from pos2d.layout import Bools, Ints
from pos2d.manifest import Manifest
from pos2d.runtime.backends.memory import check_memory
from pos2d.runtime.backends.onnx import cuda as onnx_cuda
from pos2d.runtime.backends.onnx.fixed_steps import MOST_TOKENS, Arrays, unrecorded
from pos2d.runtime.backends.onnx.kv_cache import PAST, OnnxCache
from pos2d.runtime.backends.onnx.sessions import BATCH, CAUSAL, GENERAL, OnnxGraphs
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.engine.backend import Floats


class OnnxBackend:
    """One decoder on the CPU or a CUDA card."""

    # Fewer than the others read at once: what a piece need not attend to is not even computed.
    piece = GRAPH_ROWS

    def __init__(self, directory: Path, manifest: Manifest, options: LoadOptions) -> None:
        if options.dtype not in ("auto", manifest.dtype):
            raise UsageError(
                f"dtype {options.dtype!r}: this ONNX artifact computes in {manifest.dtype}; leave --dtype out"
            )
        if options != LoadOptions(device=options.device, dtype=options.dtype):
            raise UsageError(
                f"{directory} is an ONNX artifact; --quant, --int8-kernel, --attn-implementation, --device-map and "
                "--max-memory are for merged and bnb ones"
            )
        self.device = _device(options.device, manifest.dtype)
        if self.device == "cuda":
            onnx_cuda.check_card()
        self.fixed_steps = self.device == "cuda"
        self._unrecorded = unrecorded()
        check_memory(directory, manifest, manifest.dtype)
        graph = manifest.graph or {}
        self.graphs = OnnxGraphs(directory, graph["graphs"], self.device)
        self._context_length = manifest.context_length
        self._vocab = manifest.vocab_size
        self._dtype = manifest.dtype
        inputs = graph["graphs"][BATCH]["inputs"]
        self._cache_shapes = {i["name"]: i["shape"] for i in inputs if i["name"].startswith(PAST)}

    def expect_branches(self, count: int) -> None:
        self.graphs.expect(CAUSAL if count == 1 else GENERAL)

    def with_float_activations(self, kinds: Collection[str]) -> "OnnxBackend":
        """The same decoder, but with float activations in the quantised layers of ``kinds``; for comparison, slow."""
        other = copy(self)
        other.graphs = self.graphs.with_float_activations(kinds)
        return other

    def new_cache(self, capacity: int) -> OnnxCache:
        return self._cache(capacity, 1)

    def new_batch_cache(self, batch: int) -> OnnxCache:
        # Of several rows the whole buffers are read, so they grow as they fill.
        return self._cache(0, batch)

    def _cache(self, capacity: int, batch: int) -> OnnxCache:
        return OnnxCache(self._cache_shapes, self._dtype, self.device, capacity, batch)

    def forward(
        self,
        input_ids: Ints,
        position_ids: Ints,
        pos2d: Ints,
        mask: Bools,
        cache: OnnxCache | None = None,
        rows: Ints | None = None,
        counts: Ints | None = None,
    ) -> Floats:
        batch, new = input_ids.shape
        cache = self._cache(new, batch) if cache is None else cache
        self._check_positions(position_ids, pos2d)
        total = cache.length + new
        cache.reserve(total)
        name, session = self.graphs.session(_least(mask, cache))
        rows = np.arange(new) if rows is None else rows
        fixed = self.fixed_steps and name != BATCH and rows.shape[-1] == new <= MOST_TOKENS
        feeds: dict[str, npt.NDArray[Any]] = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "pos2d": pos2d,
            "logits_rows": np.broadcast_to(rows, (batch, rows.shape[-1])),
        }
        width = cache.capacity if fixed or name == BATCH else total
        if name == BATCH:
            feeds["cache_lengths"] = cache.lengths
        else:
            feeds["seqlens_k"] = (cache.lengths + new - 1).astype(np.int32)
        if name == CAUSAL:
            feeds["total_sequence_length"] = np.array(width, dtype=np.int32)
        else:
            missing = width - mask.shape[2]
            feeds["attention_mask"] = (np.pad(mask, ((0, 0), (0, 0), (0, missing))) if missing else mask)[:, None]
        logits = np.empty((batch, rows.shape[-1], self._vocab), dtype=self._dtype)
        if fixed:
            self.graphs.steps.run(feeds, cache, logits)
        else:
            self._run(session, feeds, cache, logits)
        cache.lengths = cache.lengths + (new if counts is None else counts)
        return logits.astype(np.float32, copy=False)

    def _run(self, session: ort.InferenceSession, feeds: Arrays, cache: OnnxCache, logits: npt.NDArray[Any]) -> None:
        binding = self.graphs.binding(cache)
        kept = {key: np.ascontiguousarray(value) for key, value in feeds.items()}
        for key, value in kept.items():
            binding.bind_cpu_input(key, value)
        binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
        session.run_with_iobinding(binding, self._unrecorded)

    def _check_positions(self, position_ids: Ints, pos2d: Ints) -> None:
        """Raises:
        InputError: a token stands beyond the model's length.
        """
        last = max(int(position_ids.max()), int(pos2d[..., 1].max()))
        if last >= self._context_length:
            raise InputError(
                f"a token stands at position {last}, the model has {self._context_length}; shorten the prompts"
            )


def _least(mask: Bools, cache: OnnxCache) -> str:
    """The least general graph for a pass."""
    batch, new, total = mask.shape
    if batch > 1:
        return BATCH
    if new == 1:
        return CAUSAL if mask.all() else GENERAL
    past = cache.length
    causal = np.arange(total)[None] <= past + np.arange(new)[:, None]
    return CAUSAL if total == past + new and np.array_equal(mask[0], causal) else GENERAL


def _device(asked: str, dtype: str) -> str:
    """``cpu`` or ``cuda``.

    Raises:
        UsageError: another device, or a card for a graph that its kernels cannot compute.
    """
    if asked not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {asked!r}: ONNX artifacts run on cpu or cuda")
    if asked == "cuda" and dtype != "float16":
        raise UsageError(f"device cuda needs a float16 graph, this one is {dtype}; export it with --dtype float16")
    return "cuda" if asked == "cuda" else "cpu"
