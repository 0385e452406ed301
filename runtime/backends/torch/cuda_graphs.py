"""Decode steps as CUDA graphs: captured once for each number of new tokens, and replayed after that."""

from collections.abc import Callable, Mapping

import torch

from pos2d.runtime.backends.torch.kv_cache import CPU, FixedCache

Tensors = Mapping[str, torch.Tensor]
# Logits from the inputs of a decode step; it reads and writes the cache.
Step = Callable[[Tensors], torch.Tensor]
# A graph with the input tensors that it reads and the logits that it writes.
Captured = tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor], torch.Tensor]


class GraphedCache(FixedCache):
    """A cache of fixed size, and the graphs that were captured over its buffers."""

    def __init__(self, capacity: int, device: torch.device = CPU) -> None:
        super().__init__(capacity, device)
        self._graphs: dict[int, Captured] = {}

    def reserve(self, capacity: int) -> None:
        if capacity > self.capacity:
            self._graphs = {}  # captured over the old buffers
        super().reserve(capacity)

    def run(self, step: Step, inputs: Tensors) -> torch.Tensor:
        """Logits of one step; ``inputs`` include ``slots``, whose number of entries chooses the graph."""
        count = len(inputs["slots"])
        if count not in self._graphs:
            self._graphs[count] = self._capture(step, inputs)
        graph, static_inputs, logits = self._graphs[count]
        for name, tensor in inputs.items():
            static_inputs[name].copy_(tensor)
        graph.replay()
        return logits

    def _capture(self, step: Step, inputs: Tensors) -> Captured:
        static_inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self.slots = static_inputs["slots"]
        # Libraries initialise themselves in the first call, which must not be captured. It writes the same values into
        # the cache as the replay does.
        warmup = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        warmup.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warmup):
            step(static_inputs)
        torch.cuda.current_stream().wait_stream(warmup)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step(static_inputs)
        return graph, static_inputs, logits
