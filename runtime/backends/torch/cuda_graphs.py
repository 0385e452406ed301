"""Decoding steps as CUDA graphs: recorded once for every number of branches, and launched as a whole after that."""

from collections.abc import Callable, Mapping

import torch

from pos2d.runtime.backends.torch.kv_cache import FixedCache

Tensors = Mapping[str, torch.Tensor]
# Logits from the inputs of a step; it reads and writes the cache.
Step = Callable[[Tensors], torch.Tensor]


class GraphedCache(FixedCache):
    """A cache of fixed size with the graphs that were recorded over it."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor], torch.Tensor]] = {}

    def reserve(self, capacity: int) -> None:
        if capacity > self.capacity:
            self._graphs = {}
        super().reserve(capacity)

    def run(self, step: Step, inputs: Tensors) -> torch.Tensor:
        """Logits of one step; ``inputs`` have ``slots`` among them, by whose number a graph is found."""
        count = len(inputs["slots"])
        if count not in self._graphs:
            self._graphs[count] = self._record(step, inputs)
        graph, held, logits = self._graphs[count]
        for name, tensor in inputs.items():
            held[name].copy_(tensor)
        graph.replay()
        return logits

    def _record(
        self, step: Step, inputs: Tensors
    ) -> tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor], torch.Tensor]:
        held = {name: tensor.clone() for name, tensor in inputs.items()}
        self.slots = held["slots"]
        # Libraries set themselves up at the first call, which may not be recorded. It writes what the replay writes.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step(held)
        return graph, held, logits
