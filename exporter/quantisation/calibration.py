"""Data-free calibration: the Hessians of all linear layers, from random and self-generated tokens."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pos2d.exporter.quantisation.gptq import HessianFactors
from pos2d.onnx_io import FUSED_LAYERS
from pos2d.progress import Progress

if TYPE_CHECKING:
    import torch

    from pos2d.exporter.quantisation.layerwise_model import LayerwiseModel, Passage

SEED = 20240601
# Random sequences, and as many self-generated ones. Twice as many made no model better by more than chance.
SEQUENCES, SEQUENCE_LENGTH = 4, 256
# The linear layers of a decoder layer by the input that they share: it is recorded at the first of them.
LAYERS_BY_INPUT: Mapping[str, tuple[str, ...]] = {
    **{f"{part}.{names[0]}": tuple(f"{part}.{name}" for name in names) for part, names in FUSED_LAYERS.items()},
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.down_proj": ("mlp.down_proj",),
}


def calibrate(model: "LayerwiseModel", passages: "Sequence[Passage]" = ()) -> Iterator[Mapping[str, HessianFactors]]:
    """Run the exact model on calibration tokens; for each decoder layer in turn, yield the factorised Hessians of its
    linear layers by their full names.

    No data are needed. Half of the sequences are random tokens, and the others hold the token that the model itself
    samples after each of those. Random tokens reach all of the vocabulary, sampled ones are closer to real inputs;
    half of each makes a better 4-bit model than as many tokens of one kind. ``passages`` go through the same layers,
    and calibration does not see them.

    Raises:
        InputError: values that are not finite.
    """
    import torch

    generator = torch.Generator().manual_seed(SEED)
    sizes = model.sizes
    shape = (SEQUENCES, min(SEQUENCE_LENGTH, sizes.context_length))
    random = torch.randint(sizes.vocab, shape, generator=generator)
    hidden = model.embed(torch.cat([random, _self_generated(model, random, generator)]))
    for index in range(sizes.layers):
        hessians = model.run_layer(index, hidden, tuple(LAYERS_BY_INPUT), passages)
        yield {
            f"model.layers.{index}.{name}": hessian
            for recorded, hessian in hessians.items()
            for name in LAYERS_BY_INPUT[recorded]
        }


def _self_generated(model: "LayerwiseModel", tokens: "torch.Tensor", generator: "torch.Generator") -> "torch.Tensor":
    """The tokens ``[B, S]`` that the model samples as the next ones after each of ``tokens``."""
    hidden = model.embed(tokens)
    with Progress("generating calibration tokens", model.sizes.layers) as progress:
        for index in range(model.sizes.layers):
            model.run_layer(index, hidden)
            progress.advance()
    return model.sample_next(hidden, generator)
