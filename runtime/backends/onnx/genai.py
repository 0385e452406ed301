"""Artifacts for onnxruntime-genai on ONNX Runtime: one sequence without branches in each forward pass."""

from typing import Any

import numpy as np
import numpy.typing as npt

from pos2d.errors import UsageError
from pos2d.layout import Bools
from pos2d.onnx_io import ATTENTION_MASK, GENAI, INPUT_IDS, LOGITS, LOGITS_ROWS, POSITION_IDS
from pos2d.runtime.backends.onnx.backend import OnnxBackend, is_causal
from pos2d.runtime.backends.onnx.fixed_steps import Arrays
from pos2d.runtime.backends.onnx.kv_cache import OnnxCache
from pos2d.runtime.backends.onnx.rows import OnnxRows, OnnxRowsView
from pos2d.runtime.engine.sequence import NO_BRANCHES
from pos2d.runtime.engine.single_rows import SingleRows


class GenAIBackend(OnnxBackend):
    """A decoder that knows no branches, and computes the logits of every token of a pass."""

    def new_rows(self) -> OnnxRows | SingleRows:
        return SingleRows(self.new_cache)

    def _run(self, feeds: Arrays, mask: Bools, cache: OnnxCache | OnnxRowsView, logits: npt.NDArray[Any]) -> None:
        if not is_causal(mask, cache):
            raise UsageError(NO_BRANCHES)
        _, session = self.graphs.session(GENAI)
        total = cache.length + feeds[INPUT_IDS].shape[1]
        inputs = {name: np.ascontiguousarray(feeds[name]) for name in (INPUT_IDS, POSITION_IDS)}
        inputs[ATTENTION_MASK] = np.ones((1, total), dtype=np.int64)
        binding = self.graphs.binding(cache)
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        every = np.empty((*feeds[INPUT_IDS].shape, logits.shape[-1]), dtype=logits.dtype)
        binding.bind_output(LOGITS, "cpu", 0, every.dtype, every.shape, every.ctypes.data)
        session.run_with_iobinding(binding, self._without_capture)
        logits[:] = np.take_along_axis(every, feeds[LOGITS_ROWS][..., None], axis=1)
