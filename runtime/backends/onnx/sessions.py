"""ONNX Runtime sessions over the graph variants of an artifact, one at a time: each packs all weights for itself."""

from collections.abc import Collection
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import onnxruntime as ort
import psutil

from pos2d.errors import InputError
from pos2d.graph_metadata import differing
from pos2d.manifest import FILE_NAME, Manifest
from pos2d.onnx_io import GENAI, GraphName
from pos2d.runtime.backends.onnx import cuda as onnx_cuda
from pos2d.runtime.backends.onnx.fixed_steps import FixedSteps
from pos2d.runtime.backends.onnx.float_activations import with_float_activations
from pos2d.runtime.backends.onnx.kv_cache import OnnxCache
from pos2d.runtime.backends.onnx.rows import OnnxRowsView
from pos2d.threads import default_threads

CAUSAL: GraphName = "causal"
GENERAL: GraphName = "general"
BATCH: GraphName = "batch"
# From the cheapest to the most general: each can do what those before it do, a little slower. The last one is alone in
# its artifact.
VARIANTS = (CAUSAL, GENERAL, BATCH, GENAI)
# Products are cut into more blocks than there are threads, so that all threads finish at about the same time.
SESSION_CONFIG = {"session.dynamic_block_base": "4"}
# The directory of the weights of a graph that is given to ONNX Runtime as bytes.
WEIGHTS_DIRECTORY = "session.model_external_initializers_file_folder_path"


class OnnxGraphs:
    """The graph variants of an artifact on ``device``, ``cpu`` or ``cuda``.

    ``manifest`` is that of the artifact; ``float_kinds`` are the kinds of layers that compute with float activations.
    ``threads`` compute on the CPU; None is :func:`pos2d.threads.default_threads`.

    Raises:
        InputError: a graph that cannot be loaded, or that has other positions than the manifest.
        UsageError: a GPU that cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        device: str,
        float_kinds: Collection[str] = (),
        threads: int | None = None,
    ) -> None:
        assert manifest.graph is not None
        self._directory, self._manifest = directory, manifest
        self._data, self._graphs = manifest.graph.data, manifest.graph.graphs
        self._device, self.float_kinds, self._threads = device, float_kinds, threads
        self._session: ort.InferenceSession | None = None
        # Indices in VARIANTS: of the session that is or was loaded last, and of what has been announced.
        self._variant = -1
        self._expected = 0
        # By cache, with the version of its buffers: they are bound once and not for every step.
        self._bindings: WeakKeyDictionary[OnnxCache | OnnxRowsView, tuple[int, Any]] = WeakKeyDictionary()
        self._steps: FixedSteps | None = None

    def with_float_activations(self, kinds: Collection[str]) -> "OnnxGraphs":
        """The same graphs with accuracy level 0 in the layers of ``kinds``; no session is loaded yet."""
        graphs = OnnxGraphs(self._directory, self._manifest, self._device, kinds, self._threads)
        graphs._expected = self._expected
        return graphs

    @property
    def current(self) -> GraphName | None:
        """The variant whose session is loaded."""
        return VARIANTS[self._variant] if self._session is not None else None

    def session(self, needed: GraphName) -> tuple[GraphName, ort.InferenceSession]:
        """The cheapest variant that can do what ``needed`` does and everything that was expected or needed before."""
        variant = max(self._variant, self._expected, VARIANTS.index(needed))
        while VARIANTS[variant] not in self._graphs:  # GroupQueryAttention does not support every head size
            variant += 1
        if self._session is None or variant > self._variant:
            self.release()
            self._session, self._variant = self._load(VARIANTS[variant]), variant
        return VARIANTS[variant], self._session

    def release(self) -> None:
        """Free the memory of the session; the next call that needs one loads it again."""
        self._session, self._steps = None, None
        self._bindings.clear()

    def binding(self, cache: OnnxCache | OnnxRowsView) -> Any:
        """An I/O binding of the loaded session to the buffers of ``cache``."""
        bound = self._bindings.get(cache)
        if bound is None or bound[0] != cache.version:
            binding = self._loaded.io_binding()
            cache.bind(binding)
            bound = self._bindings[cache] = (cache.version, binding)
        return bound[1]

    @property
    def steps(self) -> FixedSteps:
        """The captured decode steps of the loaded session."""
        if self._steps is None:
            self._steps = FixedSteps(self._loaded, self._device)
        return self._steps

    @property
    def _loaded(self) -> ort.InferenceSession:
        assert self._session is not None
        return self._session

    def expect(self, variant: GraphName) -> None:
        """Announce that ``variant`` will be needed, so that no cheaper one is loaded first."""
        self._expected = max(self._expected, VARIANTS.index(variant))

    def _load(self, variant: GraphName) -> ort.InferenceSession:
        path = self._directory / self._graphs[variant].file
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = _thread_setting(self._threads)
        for key, value in SESSION_CONFIG.items():
            options.add_session_config_entry(key, value)
        on_gpu = self._device == "cuda"
        if on_gpu:
            options.add_session_config_entry(onnx_cuda.RECORD_ASSIGNMENT, "1")
        providers = [(onnx_cuda.PROVIDER, onnx_cuda.PROVIDER_OPTIONS)] if on_gpu else ["CPUExecutionProvider"]
        try:
            graph: Path | bytes = path
            if self.float_kinds:
                # ONNX Runtime refuses weights that a link places outside their directory, as the Hub's cache does.
                weights = (self._directory / self._data).resolve()
                graph = with_float_activations(path, self.float_kinds, weights.name)
                options.add_session_config_entry(WEIGHTS_DIRECTORY, str(weights.parent))
            session = ort.InferenceSession(graph, options, providers=providers)
        except Exception as error:  # ONNX Runtime has no public error class
            raise InputError(f"{path} cannot be loaded: {error}; export it again") from None
        if on_gpu:
            onnx_cuda.check_session(session)
        positions = {"rope_2d": self._manifest.rope_2d.to_dict()}
        faults = differing(positions, session.get_modelmeta().custom_metadata_map)
        if faults:
            raise InputError(f"{path} has {faults[0]} as {self._directory / FILE_NAME} says; export it again")
        return session


def _thread_setting(threads: int | None) -> int:
    """ONNX Runtime's number of threads; 0 lets it take one for each physical core, with affinities of its own."""
    limit = threads or default_threads()
    physical = psutil.cpu_count(logical=False)
    return 0 if threads is None and physical is not None and physical <= limit else limit
