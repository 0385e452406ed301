"""A base with its adapters beside it, as in training: ``y = W x + scale * B (A x)``, and no weight is ever a sum."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional

from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.backends.torch.backend import TorchBackend
from pos2d.runtime.backends.torch.decoder import load_decoder
from pos2d.runtime.opening.opened_model import OpenedModel
from pos2d.sources.adapters.deltas import Delta, Dora, LowRank
from pos2d.sources.checkpoints.checkpoint import EMBEDDING, HEAD
from pos2d.sources.source import Source
from pos2d.sources.tensors.tensor_plan import deltas_by_tensor

WEIGHT = ".weight"


class UnmergedLinear(nn.Module):
    """A linear layer with low-rank factors beside it: ``W x + bias + sum of scale * B (A x)``."""

    def __init__(self, layer: nn.Linear, deltas: Sequence[LowRank]) -> None:
        super().__init__()
        self.layer = layer
        dtype = layer.weight.dtype
        self.factors = [(delta.a.to(dtype), delta.b.to(dtype), delta.weight * delta.scale) for delta in deltas]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        for a, b, scale in self.factors:
            y = y + scale * functional.linear(functional.linear(x, a), b)
        return y


class UnmergedDora(nn.Module):
    """A linear layer with DoRA beside it: rows of ``W x + scale * B (A x)`` times ``magnitude / |W + scale * B A|``.

    The adapter's weight scales what this adds to ``W x``; at 1 it is the adapter as trained. Only the lengths of the
    rows of ``W + scale * B A`` are computed ahead, in float64.
    """

    def __init__(self, layer: nn.Linear, delta: Dora) -> None:
        super().__init__()
        self.layer = layer
        weight = layer.weight
        self.a, self.b = delta.a.to(weight.dtype), delta.b.to(weight.dtype)
        self.scale, self.share = delta.scale, delta.weight
        wide = delta.widened()
        norms = (weight.double() + (wide.b * delta.scale) @ wide.a).norm(dim=1)
        factors = wide.magnitude / norms.masked_fill(norms == 0, 1.0)
        self.factors = factors.to(weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = functional.linear(x, self.layer.weight)
        adapted = self.factors * (base + self.scale * functional.linear(functional.linear(x, self.a), self.b))
        y: torch.Tensor = base + self.share * (adapted - base)
        return y if self.layer.bias is None else y + self.layer.bias


def load_unmerged(opened: OpenedModel, options: LoadOptions) -> TorchBackend:
    """Load a base whose adapters stay beside its linear layers; ``opened`` must have a source.

    Whatever is not a low-rank change of a linear layer (biases, modules that an adapter holds in full, embeddings, DoRA
    with other adapters) is added while the weights are loaded.

    Raises: as :func:`pos2d.load`.
    """
    assert opened.source is not None
    beside, source = split_adapters(opened.source)
    model, device_map = load_decoder(replace(opened, source=source), options)
    for module, deltas in beside.items():
        layer = model.get_submodule(module)
        assert isinstance(layer, nn.Linear)
        low_rank = [delta for delta in deltas if isinstance(delta, LowRank)]
        first = deltas[0]
        model.set_submodule(
            module, UnmergedDora(layer, first) if isinstance(first, Dora) else UnmergedLinear(layer, low_rank)
        )
    return TorchBackend(model, device_map)


def split_adapters(source: Source) -> tuple[Mapping[str, Sequence[Delta]], Source]:
    """The changes that can stay beside a linear layer, by the name of its module, and the source without them."""
    deltas = deltas_by_tensor(source.adapters)
    beside = {
        name: added
        for name, added in deltas.items()
        if (name.endswith("_proj.weight") or (name == HEAD and EMBEDDING not in deltas))
        and _is_low_rank(added, source, name)
    }
    rest = tuple(
        replace(adapter, deltas={name: added for name, added in adapter.deltas.items() if name not in beside})
        for adapter in source.adapters
    )
    return {name.removesuffix(WEIGHT): added for name, added in beside.items()}, replace(source, adapters=rest)


def _is_low_rank(deltas: Sequence[Delta], source: Source, name: str) -> bool:
    """Whether all of ``deltas`` are products beside one whole tensor: of any number of LoRAs, or of one DoRA."""
    place = source.base.tensors.get(name) or source.base.tensors[EMBEDDING]
    fits = all(delta.height == place.shape[0] for delta in deltas) and place.kept_rows == place.shape[0]
    return fits and (all(isinstance(delta, LowRank) for delta in deltas) or [type(delta) for delta in deltas] == [Dora])
