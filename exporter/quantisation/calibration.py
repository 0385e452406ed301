"""What the inputs of every layer are like, so that quantising makes up for its errors where they would be seen."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from typing import TYPE_CHECKING

from pos2d.exporter.quantisation.gptq import Curvature
from pos2d.exporter.sources.source import Source
from pos2d.exporter.tensors.plan import PlannedTensor
from pos2d.progress import Progress

if TYPE_CHECKING:
    import torch

    from pos2d.exporter.quantisation.layerwise_model import ExactDecoder

SEED = 20240601
# Of each of the two texts. Twice as much made no model better that could be told from chance.
SEQUENCES, LENGTH = 4, 256
# Layers that read the same input, by the first of them.
READERS: Mapping[str, tuple[str, ...]] = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


def calibrate(
    source: Source, tensors: Mapping[str, PlannedTensor], workers: Executor
) -> Iterator[Mapping[str, Curvature]]:
    """For one block of the decoder after the other, the curvature of its linear layers by name.

    Nobody's data are needed: the model reads random tokens, and what it would write after each of them. The first
    reach everything that it knows, the second are nearer to what it will read; together they make a better model of 4
    bits than as many of either. ``workers`` read the weights.

    Raises:
        InputError: values that are not finite.
    """
    import torch

    from pos2d.exporter.quantisation.layerwise_model import ExactDecoder

    draw = torch.Generator().manual_seed(SEED)
    sizes = source.base.sizes
    shape = (SEQUENCES, min(LENGTH, sizes.context_length))
    random = torch.randint(sizes.vocab, shape, generator=draw)
    with ExactDecoder(source, tensors, workers) as decoder:
        texts = torch.cat([random, _written(decoder, random, draw)])
        hidden = decoder.embed(texts)
        for number in range(sizes.layers):
            found = decoder.read(number, hidden, tuple(READERS))
            yield {
                f"model.layers.{number}.{module}": curvature
                for first, curvature in found.items()
                for module in READERS[first]
            }


def _written(decoder: "ExactDecoder", tokens: "torch.Tensor", draw: "torch.Generator") -> "torch.Tensor":
    """The tokens ``[B, S]`` that the model draws after each of ``tokens``."""
    hidden = decoder.embed(tokens)
    with Progress("reading the model", decoder.sizes.layers) as progress:
        for number in range(decoder.sizes.layers):
            decoder.read(number, hidden)
            progress.advance()
    return decoder.draw(hidden, draw)
