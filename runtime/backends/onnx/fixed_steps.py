"""Decoding steps of fixed shapes and addresses, which ONNX Runtime records as CUDA graphs and then only replays.

Every step of as many tokens has the same shapes, because attention goes over the whole capacity of the cache and a mask
hides what is not there yet.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from pos2d.runtime.backends.onnx.kv_cache import OnnxCache

# Steps of more tokens are prompts, whose shapes hardly ever come again.
MOST_TOKENS = 32
GRAPH_ID, NOT_RECORDED = "gpu_graph_id", "-1"

Arrays = Mapping[str, npt.NDArray[Any]]


class FixedSteps:
    """The recorded steps of one session, by cache, capacity and number of tokens; ``device`` is ``cpu`` or ``cuda``."""

    def __init__(self, session: ort.InferenceSession, device: str) -> None:
        self.session = session
        self._device = device
        self._steps: dict[tuple[int, int, int], _Step] = {}
        self._recorded = 0

    def device_of(self, name: str) -> str:
        # GroupQueryAttention reads the total length before it starts anything on the card.
        return "cpu" if name == "total_sequence_length" else self._device

    def run(self, feeds: Arrays, cache: OnnxCache, logits: npt.NDArray[Any]) -> None:
        """Fill ``logits``; ``feeds`` have their final shapes."""
        key = (id(cache), cache.capacity, feeds["input_ids"].shape[1])
        if key not in self._steps:
            # A cache has one size at a time; what was recorded over its smaller self is of no use any more.
            self._steps = {old: step for old, step in self._steps.items() if old[0] != key[0] or old[1] == key[1]}
            self._steps[key] = _Step(self, feeds, cache, logits, self._recorded)
            self._recorded += 1
        self._steps[key].run(feeds, logits)


class _Step:
    def __init__(
        self, steps: FixedSteps, feeds: Arrays, cache: OnnxCache, logits: npt.NDArray[Any], number: int
    ) -> None:
        self._session, self._cache = steps.session, cache  # held, so that no other cache has its address
        self._values = {name: _fixed(array, steps.device_of(name)) for name, array in feeds.items()}
        self._logits = _fixed(logits, steps.device_of("logits"))
        self._binding = steps.session.io_binding()
        cache.bind(self._binding)
        for name, value in self._values.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output("logits", self._logits)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry(GRAPH_ID, str(number))

    def run(self, feeds: Arrays, logits: npt.NDArray[Any]) -> None:
        for name, value in self._values.items():
            value.update_inplace(np.ascontiguousarray(feeds[name]))
        self._session.run_with_iobinding(self._binding, self._options)
        logits[:] = self._logits.numpy()


def _fixed(array: npt.NDArray[Any], device: str) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.array(array), device, 0)


def unrecorded() -> ort.RunOptions:
    """Options of a pass that is not recorded."""
    options = ort.RunOptions()
    options.add_run_config_entry(GRAPH_ID, NOT_RECORDED)
    return options
