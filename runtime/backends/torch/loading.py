"""Load a torch artifact tensor by tensor. Stored quantised weights stay as they are; others can be quantised here."""

import ctypes
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pos2d.bnb_format import STORED_PARTS, BnbQuant
from pos2d.errors import InputError
from pos2d.families import CLASS_NAMES
from pos2d.hf import configuration_pos2d
from pos2d.hf.empty_model import empty_model
from pos2d.progress import Progress
from pos2d.recipes import BnbRecipe
from pos2d.runtime.backends.options import Int8Kernel
from pos2d.runtime.backends.torch.devices import DeviceOf
from pos2d.runtime.backends.torch.linears import quantised_linear, stored_linear
from pos2d.runtime.backends.torch.weights import TensorSource

HEAD = "lm_head"


def empty_decoder(config: Mapping[str, Any], family: str, attention: str, source: Path) -> PreTrainedModel:
    """A model without weights, except for its rotary frequencies.

    ``config`` is that of our classes, and ``source`` names it in errors; ``attention`` is the name of an implementation
    that transformers knows.

    Raises:
        InputError: a configuration that transformers cannot read.
    """
    name = CLASS_NAMES[family]
    try:
        settings = getattr(configuration_pos2d, f"{name}Config").from_dict(dict(config))
        settings._attn_implementation = attention
        model: PreTrainedModel = empty_model(settings, f"{name}ForCausalLM")
    except Exception as error:  # whatever its classes make of a damaged configuration
        reason = " ".join(str(error).split())
        raise InputError(f"{source}: the configuration cannot be used: {reason}") from None
    return model


def sized_decoder(model: PreTrainedModel, recipe: BnbRecipe | None, dtype: torch.dtype) -> PreTrainedModel:
    """Give the parameters of an empty model their final types and sizes, for a device map; it cannot be filled then."""
    for parameter in model.parameters():  # rotary frequencies are no parameters, and stay float32
        parameter.data = parameter.data.to(dtype)
    for layer in quantised_modules(model, recipe).values():
        rows, columns = layer.weight.shape
        shape = (rows, columns) if recipe is not None and recipe.name == "8bit" else ((rows * columns + 1) // 2, 1)
        layer.weight = nn.Parameter(torch.empty(shape, dtype=torch.uint8, device="meta"), requires_grad=False)
    return model


def quantised_modules(model: PreTrainedModel, recipe: BnbRecipe | None) -> dict[str, nn.Linear]:
    """The linear layers that ``recipe`` quantises, by name."""
    if recipe is None:
        return {}
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name not in recipe.skip_modules
    }
    recipe.check({name: (layer.out_features, layer.in_features) for name, layer in layers.items()})
    return layers


def fill_decoder(
    model: PreTrainedModel,
    tensors: TensorSource,
    recipe: BnbRecipe | None,
    stored: bool,
    kernel: Int8Kernel,
    dtype: torch.dtype,
    device_of: DeviceOf,
) -> None:
    """Give an empty model its weights, each on the device that ``device_of`` names for its module.

    The layers of ``recipe`` are quantised one at a time as they are read, or are quantised in the files already
    (``stored``), so at most one of their weights is in memory in full precision. All other weights are converted to
    ``dtype``.

    Raises:
        InputError: tensors that are missing, unknown or of another shape.
    """
    layers = quantised_modules(model, recipe)
    plain = {name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in layers}
    tied = model.config.tie_word_embeddings and HEAD not in layers
    if tied:
        plain.discard(f"{HEAD}.weight")
    parts = {name: _part_names(layer, recipe.name if recipe and stored else None) for name, layer in layers.items()}
    _check_names(tensors, {*plain, *(f"{module}.{part}" for module, names in parts.items() for part in names)})
    with Progress("loading", len(tensors.files)) as progress:
        # While a tensor is copied, its mapped file holds it too. The largest are read first, when memory is emptiest.
        for name in sorted(plain, key=lambda name: (-model.get_parameter(name).numel(), name)):
            module, _, attribute = name.rpartition(".")
            owner = model.get_submodule(module)
            value = tensors.read(name, device_of(module), dtype)
            _check_shape(name, value, getattr(owner, attribute))
            setattr(owner, attribute, nn.Parameter(value, requires_grad=False))
            progress.advance()
        for module, layer in layers.items():
            assert recipe is not None
            values = {part: tensors.read(f"{module}.{part}", device_of(module)) for part in parts[module]}
            _check_shape(f"{module}.weight", values["weight"], layer.weight, halved=stored and recipe.name == "nf4")
            make_linear = stored_linear if stored else quantised_linear
            model.set_submodule(module, make_linear(values, recipe.name, kernel, dtype))
            progress.advance(len(values))
            del values
            return_freed_memory()
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb.to(device_of("model.embed_tokens"))
    model.eval()  # in training mode bitsandbytes does not quantise activations on a CPU


def return_freed_memory() -> None:
    """Give freed memory to the system, where glibc manages it.

    glibc keeps freed weights, and the next weight often does not fit into a gap of its own size, because torch wants it
    aligned. Without this call, quantising a model while it is loaded can take the memory of all its weights.
    """
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _c_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def _part_names(layer: nn.Linear, stored: BnbQuant | None) -> tuple[str, ...]:
    """The names of a layer's tensors in the files, without the layer's name."""
    weight = STORED_PARTS[stored] if stored else ("weight",)
    return weight if layer.bias is None else (*weight, "bias")


def _check_names(tensors: TensorSource, expected: set[str]) -> None:
    faults = sorted(expected ^ set(tensors.files))
    if faults:
        raise InputError(
            f"{tensors.directory}: the weights do not fit the model: {faults[0]} is "
            f"{'missing' if faults[0] in expected else 'unknown'} ({len(faults)} in all); make the artifact again"
        )


def _check_shape(name: str, value: torch.Tensor, expected: torch.Tensor, halved: bool = False) -> None:
    """Check a tensor against the empty model's; ``halved`` says that two values are packed into each byte.

    Raises:
        InputError: the shape does not fit.
    """
    fits = 2 * value.numel() == expected.numel() if halved else value.shape == expected.shape
    if not fits:
        raise InputError(
            f"{name} has shape {tuple(value.shape)}, the model has {tuple(expected.shape)}; make the artifact again"
        )
