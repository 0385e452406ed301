"""ONNX artifacts on ONNX Runtime."""

from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from pos2d.errors import InputError, UsageError
from pos2d.layout import Bools, Ints
from pos2d.manifest import Manifest
from pos2d.memory_costs import GRAPH_PREFILL_CHUNK
from pos2d.onnx_io import (
    ATTENTION_MASK,
    CACHE_LENGTHS,
    INPUT_IDS,
    LOGITS,
    LOGITS_ROWS,
    PAST_PREFIX,
    POS2D,
    POSITION_IDS,
    SEQLENS_K,
    TOTAL_SEQUENCE_LENGTH,
    GraphName,
)
from pos2d.runtime.backends.memory import check_memory
from pos2d.runtime.backends.onnx import cuda as onnx_cuda
from pos2d.runtime.backends.onnx.fixed_steps import MAX_STEP_TOKENS, Arrays, without_capture
from pos2d.runtime.backends.onnx.kv_cache import OnnxCache
from pos2d.runtime.backends.onnx.rows import OnnxRows, OnnxRowsView
from pos2d.runtime.backends.onnx.sessions import BATCH, CAUSAL, GENERAL, OnnxGraphs
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.engine.backend import KV_PARTS, Floats, KVFormat
from pos2d.runtime.engine.single_rows import SingleRows


class OnnxBackend:
    """One decoder on the CPU or a CUDA GPU; threads may share it, each with caches of its own.

    Raises:
        UsageError: an option that this artifact cannot use.
        InputError: a graph that cannot be loaded.
        StorageError: not enough memory.
    """

    # Smaller than the torch backend's chunks, because what a chunk cannot attend to is not computed here.
    prefill_chunk = GRAPH_PREFILL_CHUNK

    def __init__(self, directory: Path, manifest: Manifest, options: LoadOptions) -> None:
        _check_options(directory, manifest, options)
        self.device = _device(options.device, manifest.dtype)
        if self.device == "cuda":
            onnx_cuda.check_gpu()
        self.fixed_steps = self.device == "cuda"
        self._without_capture = without_capture()
        check_memory(directory, manifest, manifest.dtype)
        assert manifest.graph is not None
        self.graphs = OnnxGraphs(directory, manifest, self.device, threads=options.threads)
        # A pass holds it from the choice of a session to the end of its run: another thread may need a more general
        # graph, which replaces the session, and two passes at once would share the same cores anyway.
        self._lock = Lock()
        self._context_length = manifest.context_length
        self._vocab_size = manifest.vocab_size
        self._dtype = manifest.dtype
        inputs = next(iter(manifest.graph.graphs.values())).inputs  # all graphs have the same cache
        self._cache_shapes = {i.name: i.shape for i in inputs if i.name.startswith(PAST_PREFIX)}

    @property
    def arithmetic(self) -> Mapping[str, str]:
        facts = {"backend": "onnx", "dtype": self._dtype, "device": self.device}
        kinds = self.graphs.float_kinds
        return facts | ({"float_activations": ",".join(sorted(kinds))} if kinds else {})

    @property
    def kv_format(self) -> KVFormat:
        _, heads, _, head_dim = next(iter(self._cache_shapes.values()))
        return KVFormat(len(self._cache_shapes) // len(KV_PARTS), int(heads), int(head_dim), self._dtype, "np")

    def expect_branches(self, count: int) -> None:
        with self._lock:
            self.graphs.expect(_variant_for(count))

    def load_for(self, count: int) -> None:
        with self._lock:
            self.graphs.session(_variant_for(count))

    def with_float_activations(self, kinds: Collection[str]) -> "OnnxBackend":
        """The same decoder with float activations in the quantised layers of ``kinds``; slow, for comparisons."""
        backend = copy(self)
        backend.graphs = self.graphs.with_float_activations(kinds)
        return backend

    def new_cache(self, capacity: int) -> OnnxCache:
        return OnnxCache(self._cache_shapes, self._dtype, self.device, capacity)

    def new_rows(self) -> OnnxRows | SingleRows:
        if self.device != "cpu":  # rows share the memory of numpy's arrays
            return SingleRows(self.new_cache)
        with self._lock:
            self.graphs.expect(BATCH)
        return OnnxRows(self._cache_shapes, self._dtype)

    def forward(
        self,
        input_ids: Ints,
        position_ids: Ints,
        pos2d: Ints,
        mask: Bools,
        cache: OnnxCache | OnnxRowsView | None = None,
        rows: Ints | None = None,
        counts: Ints | None = None,
    ) -> Floats:
        batch, new = input_ids.shape
        cache = self._one_pass(batch, new) if cache is None else cache
        self._check_positions(position_ids, pos2d)
        cache.reserve(cache.length + new)
        rows = np.arange(new) if rows is None else rows
        feeds: dict[str, npt.NDArray[Any]] = {
            INPUT_IDS: input_ids,
            POSITION_IDS: position_ids,
            POS2D: pos2d,
            LOGITS_ROWS: np.broadcast_to(rows, (batch, rows.shape[-1])),
        }
        logits = np.empty((batch, rows.shape[-1], self._vocab_size), dtype=self._dtype)
        with self._lock:
            self._run(feeds, mask, cache, logits)
        cache.lengths = cache.lengths + (new if counts is None else counts)
        return logits.astype(np.float32, copy=False)

    def _one_pass(self, batch: int, new: int) -> OnnxCache | OnnxRowsView:
        """A cache for a pass whose keys and values nobody keeps."""
        if batch == 1:
            return self.new_cache(new)
        rows = OnnxRows(self._cache_shapes, self._dtype)
        for _ in range(batch):
            rows.add()
        return rows.rows(0, batch)

    def _run(self, feeds: Arrays, mask: Bools, cache: OnnxCache | OnnxRowsView, logits: npt.NDArray[Any]) -> None:
        """Fill ``logits`` with the cheapest graph; ``feeds`` are the inputs that every graph has."""
        variant, session = self.graphs.session(_cheapest_variant(mask, cache))
        new = feeds[INPUT_IDS].shape[1]
        fixed = (
            isinstance(cache, OnnxCache)
            and self.fixed_steps
            and variant != BATCH
            and logits.shape[1] == new <= MAX_STEP_TOKENS
        )
        width = cache.capacity if fixed or variant == BATCH else cache.length + new
        feeds = {**feeds, **_attention_feeds(variant, mask, cache, new, width)}
        if fixed:
            assert isinstance(cache, OnnxCache)
            self.graphs.steps.run(feeds, cache, logits)
            return
        binding = self.graphs.binding(cache)
        inputs = {name: np.ascontiguousarray(array) for name, array in feeds.items()}  # alive during the run
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output(LOGITS, "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
        session.run_with_iobinding(binding, self._without_capture)

    def _check_positions(self, position_ids: Ints, pos2d: Ints) -> None:
        """Check that every token is within the model's context length.

        Raises:
            InputError: a position or time is too large.
        """
        last = max(int(position_ids.max()), int(pos2d[..., 1].max()))
        if last >= self._context_length:
            raise InputError(
                f"a token is at position {last}, the model has {self._context_length} positions; shorten the prompts"
            )


def _check_options(directory: Path, manifest: Manifest, options: LoadOptions) -> None:
    """Check that only options were given that ONNX artifacts have.

    Raises:
        UsageError: another type than the graph's, or an option of torch artifacts.
    """
    if options.dtype not in ("auto", manifest.dtype):
        raise UsageError(
            f"`dtype` {options.dtype!r}: this ONNX artifact computes in {manifest.dtype}; leave `dtype` out"
        )
    allowed = asdict(LoadOptions(device=options.device, dtype=options.dtype, threads=options.threads))
    inapplicable = [f"`{name}`" for name, value in asdict(options).items() if value != allowed[name]]
    if inapplicable:
        raise UsageError(
            f"{directory} is an ONNX artifact and does not take {', '.join(inapplicable)}; leave that out, or load a "
            "merged or bnb artifact"
        )


def _variant_for(branches: int) -> GraphName:
    """The graph that decodes so many branches of one sequence."""
    return CAUSAL if branches == 1 else GENERAL


def _cheapest_variant(mask: Bools, cache: OnnxCache | OnnxRowsView) -> GraphName:
    """The cheapest graph variant that can compute a pass with this mask."""
    if len(mask) > 1:
        return BATCH
    return CAUSAL if is_causal(mask, cache) else GENERAL


def is_causal(mask: Bools, cache: OnnxCache | OnnxRowsView) -> bool:
    """Whether ``mask`` lets every token of one sequence attend to all tokens before it and to itself."""
    batch, new, total = mask.shape
    if batch == new == 1:
        return bool(mask.all())
    past = cache.length
    causal = np.arange(total)[None] <= past + np.arange(new)[:, None]
    return batch == 1 and total == past + new and np.array_equal(mask[0], causal)


def _attention_feeds(
    variant: GraphName, mask: Bools, cache: OnnxCache | OnnxRowsView, new: int, width: int
) -> dict[str, npt.NDArray[Any]]:
    """The inputs that say what attention may read: lengths, and the mask padded to ``width`` slots."""
    feeds: dict[str, npt.NDArray[Any]] = {}
    if variant == BATCH:
        feeds[CACHE_LENGTHS] = cache.lengths
    else:
        feeds[SEQLENS_K] = (cache.lengths + new - 1).astype(np.int32)
    if variant == CAUSAL:
        feeds[TOTAL_SEQUENCE_LENGTH] = np.array(width, dtype=np.int32)
    else:
        missing = width - mask.shape[2]
        feeds[ATTENTION_MASK] = (np.pad(mask, ((0, 0), (0, 0), (0, missing))) if missing else mask)[:, None]
    return feeds


def _device(name: str, dtype: str) -> str:
    """``cpu`` or ``cuda``, for a graph of type ``dtype``.

    Raises:
        UsageError: another device, or a GPU for a graph that ONNX Runtime's CUDA kernels cannot compute.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"`device` {name!r}: ONNX artifacts run on cpu or cuda")
    if name == "cuda" and dtype != "float16":
        raise UsageError(
            f"`device='cuda'` needs a float16 graph, this one is {dtype}; export it with `dtype='float16'`"
        )
    return "cuda" if name == "cuda" else "cpu"
