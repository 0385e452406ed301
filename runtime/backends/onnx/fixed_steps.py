"""Decode steps of fixed shapes and addresses, which ONNX Runtime captures as CUDA graphs and then only replays.

Every step with the same number of tokens has the same shapes, because attention reads the whole capacity of the cache
and a mask hides the slots that are not filled yet.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from pos2d.onnx_io import INPUT_IDS, LOGITS, TOTAL_SEQUENCE_LENGTH
from pos2d.runtime.backends.onnx.kv_cache import OnnxCache

# Passes of more tokens are prefill, whose shapes rarely recur.
MAX_STEP_TOKENS = 32
GRAPH_ID, NOT_CAPTURED = "gpu_graph_id", "-1"

Arrays = Mapping[str, npt.NDArray[Any]]


class FixedSteps:
    """The captured steps of one session, by cache, capacity and number of tokens; ``device`` is ``cpu`` or ``cuda``."""

    def __init__(self, session: ort.InferenceSession, device: str) -> None:
        self.session = session
        self._device = device
        self._steps: dict[tuple[int, int, int], _Step] = {}
        self._captured = 0

    def device_of(self, name: str) -> str:
        """The device of an input or output."""
        # GroupQueryAttention reads the total length on the CPU, before it launches anything on the GPU.
        return "cpu" if name == TOTAL_SEQUENCE_LENGTH else self._device

    def run(self, feeds: Arrays, cache: OnnxCache, logits: npt.NDArray[Any]) -> None:
        """Run one step and fill ``logits``; ``feeds`` have their final shapes."""
        key = (id(cache), cache.capacity, feeds[INPUT_IDS].shape[1])
        if key not in self._steps:
            # Steps that were captured over this cache's former, smaller buffers are useless now.
            self._steps = {old: step for old, step in self._steps.items() if old[0] != key[0] or old[1] == key[1]}
            self._steps[key] = _Step(self, feeds, cache, logits, self._captured)
            self._captured += 1
        self._steps[key].run(feeds, logits)


class _Step:
    """One captured step: its inputs and outputs at fixed addresses, and the ``graph_id`` under which it is replayed."""

    def __init__(
        self, steps: FixedSteps, feeds: Arrays, cache: OnnxCache, logits: npt.NDArray[Any], graph_id: int
    ) -> None:
        self._session, self._cache = steps.session, cache  # keeps the cache alive, so that no other has its address
        self._values = {name: _fixed(array, steps.device_of(name)) for name, array in feeds.items()}
        self._logits = _fixed(logits, steps.device_of(LOGITS))
        self._binding = steps.session.io_binding()
        cache.bind(self._binding)
        for name, value in self._values.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output(LOGITS, self._logits)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry(GRAPH_ID, str(graph_id))

    def run(self, feeds: Arrays, logits: npt.NDArray[Any]) -> None:
        for name, value in self._values.items():
            value.update_inplace(np.ascontiguousarray(feeds[name]))
        self._session.run_with_iobinding(self._binding, self._options)
        logits[:] = self._logits.numpy()


def _fixed(array: npt.NDArray[Any], device: str) -> ort.OrtValue:
    """A copy of ``array`` on ``device``, at an address that does not change."""
    return ort.OrtValue.ortvalue_from_numpy(np.array(array), device, 0)


def without_capture() -> ort.RunOptions:
    """Run options of a pass that is not captured."""
    options = ort.RunOptions()
    options.add_run_config_entry(GRAPH_ID, NOT_CAPTURED)
    return options
