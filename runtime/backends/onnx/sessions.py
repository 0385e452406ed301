"""The graphs of an ONNX artifact as sessions: one at a time, because each has its weights packed for itself."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import onnxruntime as ort

from pos2d.errors import InputError
from pos2d.runtime.backends.onnx import cuda as onnx_cuda
from pos2d.runtime.backends.onnx.fixed_steps import FixedSteps
from pos2d.runtime.backends.onnx.float_activations import with_float_activations
from pos2d.runtime.backends.onnx.kv_cache import OnnxCache

# From the least to the most general: each can do what those before it do, a little slower.
CAUSAL, GENERAL, BATCH = "causal", "general", "batch"
LADDER = (CAUSAL, GENERAL, BATCH)
# Products are cut into more pieces than there are threads: these then end together.
SETTINGS = {"session.dynamic_block_base": "4"}
# Where ONNX Runtime looks for the weights of a graph that it gets as bytes.
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class OnnxGraphs:
    """``graphs``: of a manifest. ``device``: ``cpu`` or ``cuda``. ``floating``: kinds of layers with float activations.

    Raises:
        InputError: a graph that cannot be loaded.
        UsageError: a card that cannot be used.
    """

    def __init__(self, directory: Path, graphs: Mapping[str, Any], device: str, floating: Collection[str] = ()) -> None:
        self._directory, self._graphs, self._device, self._floating = directory, graphs, device, floating
        self._rung = -1
        self._session: ort.InferenceSession | None = None
        # By cache, with its capacity at the time: what is bound once need not be bound for every step.
        self._bindings: WeakKeyDictionary[OnnxCache, tuple[int, Any]] = WeakKeyDictionary()
        self._steps: FixedSteps | None = None
        self.expected = 0

    def with_float_activations(self, kinds: Collection[str]) -> "OnnxGraphs":
        """The same graphs, none loaded yet, with accuracy level 0 in the layers of ``kinds``."""
        other = OnnxGraphs(self._directory, self._graphs, self._device, kinds)
        other.expected = self.expected
        return other

    @property
    def current(self) -> str | None:
        """The name of the graph that is loaded."""
        return LADDER[self._rung] if self._session is not None else None

    def session(self, least: str) -> tuple[str, ort.InferenceSession]:
        """The least general graph that can do what ``least`` does and what was expected or asked before, by name."""
        rung = max(self._rung, self.expected, LADDER.index(least))
        while LADDER[rung] not in self._graphs:  # GroupQueryAttention does not have every width of heads
            rung += 1
        if self._session is None or rung > self._rung:
            self.release()
            self._session, self._rung = self._load(LADDER[rung]), rung
        return LADDER[rung], self._session

    def release(self) -> None:
        """Give back the memory of the session; the next one is loaded when it is needed."""
        self._session, self._steps = None, None
        self._bindings.clear()

    def binding(self, cache: OnnxCache) -> Any:
        """The buffers of ``cache``, bound to the session that is loaded."""
        known = self._bindings.get(cache)
        if known is None or known[0] != cache.capacity:
            binding = self._loaded.io_binding()
            cache.bind(binding)
            known = self._bindings[cache] = (cache.capacity, binding)
        return known[1]

    @property
    def steps(self) -> FixedSteps:
        """The recorded steps of the session that is loaded."""
        if self._steps is None:
            self._steps = FixedSteps(self._loaded, self._device)
        return self._steps

    @property
    def _loaded(self) -> ort.InferenceSession:
        assert self._session is not None
        return self._session

    def expect(self, name: str) -> None:
        """Say that a graph will be wanted, so that none is loaded in vain before it."""
        self.expected = max(self.expected, LADDER.index(name))

    def _load(self, name: str) -> ort.InferenceSession:
        path = self._directory / self._graphs[name]["file"]
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        for entry, value in SETTINGS.items():
            settings.add_session_config_entry(entry, value)
        on_card = self._device == "cuda"
        if on_card:
            settings.add_session_config_entry(onnx_cuda.RECORDED, "1")
        chosen = [(onnx_cuda.PROVIDER, onnx_cuda.OPTIONS)] if on_card else ["CPUExecutionProvider"]
        try:
            graph: Path | bytes = path
            if self._floating:
                graph = with_float_activations(path, self._floating)
                settings.add_session_config_entry(WEIGHTS_FOLDER, str(self._directory))
            session = ort.InferenceSession(graph, settings, providers=chosen)
        except Exception as error:  # ONNX Runtime has no public error class
            raise InputError(f"{path} cannot be loaded: {error}; export it again") from None
        if on_card:
            onnx_cuda.check_session(session)
        return session
