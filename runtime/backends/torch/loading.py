"""A torch artifact into memory, tensor by tensor: quantised weights as they are, others as they come or quantised."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from pos2d.errors import InputError
from pos2d.families import CLASS_NAMES
from pos2d.hf import configuration_pos2d, modeling_pos2d
from pos2d.manifest import Manifest
from pos2d.progress import Progress
from pos2d.recipe import Quant, QuantRecipe
from pos2d.runtime.backends.options import Int8Kernel
from pos2d.runtime.backends.torch.linears import STORED_PARTS, quantised_linear, stored_linear

HEAD = "lm_head"
Place = Callable[[str], torch.device]


def empty_decoder(described: Path | Mapping[str, Any], family: str, attention: str) -> PreTrainedModel:
    """A model without any weights, but for its rotary frequencies; ``described`` by the directory of an artifact, or by
    what its ``config.json`` would say."""
    name = CLASS_NAMES[family]
    kind = getattr(configuration_pos2d, f"{name}Config")
    config = kind.from_pretrained(described) if isinstance(described, Path) else kind.from_dict(dict(described))
    config._attn_implementation = attention
    with torch.device("meta"):
        model: PreTrainedModel = getattr(modeling_pos2d, f"{name}ForCausalLM")(config)
    turning = model.model.rotary_emb
    model.model.rotary_emb = type(turning)(type(turning.stock)(config), turning.axes)
    return model


def sized_decoder(directory: Path, family: str, recipe: QuantRecipe | None, dtype: torch.dtype) -> PreTrainedModel:
    """An empty model whose parameters are as large as those of a filled one; it cannot be filled itself."""
    model = empty_decoder(directory, family, "eager")
    for parameter in model.parameters():  # not the frequencies, which stay float32
        parameter.data = parameter.data.to(dtype)
    for layer in quantised_modules(model, recipe).values():
        rows, columns = layer.weight.shape
        packed = (rows, columns) if recipe is not None and recipe.name == "8bit" else ((rows * columns + 1) // 2, 1)
        layer.weight = nn.Parameter(torch.empty(packed, dtype=torch.uint8, device="meta"), requires_grad=False)
    return model


def quantised_modules(model: PreTrainedModel, recipe: QuantRecipe | None) -> dict[str, nn.Linear]:
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


class TensorSource(Protocol):
    """Where weights come from; ``files`` names for every tensor the one of ``directory`` that it is in."""

    @property
    def directory(self) -> Path: ...

    @property
    def files(self) -> Mapping[str, str]: ...

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor of the caller's own, in its own type where no other is asked for."""


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """The tensors of an artifact's files, each read when it is asked for and kept nowhere."""

    directory: Path
    files: Mapping[str, str]

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        # Files are mapped, and what was read of them counts as this process's memory until they are closed.
        with safe_open(self.directory / self.files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor.to(device=device, dtype=dtype, copy=True)


def stored_tensors(directory: Path, manifest: Manifest) -> StoredTensors:
    """Raises:
    InputError: a file that is not safetensors.
    """
    found: dict[str, str] = {}
    for file in (name for name in manifest.files if name.endswith(".safetensors")):
        try:
            with safe_open(directory / file, framework="pt") as opened:
                found |= dict.fromkeys(opened.keys(), file)
        except SafetensorError as error:
            raise InputError(f"{directory / file} cannot be read: {error}; make the artifact again") from None
    return StoredTensors(directory, found)


def fill_decoder(
    model: PreTrainedModel,
    tensors: TensorSource,
    recipe: QuantRecipe | None,
    stored: bool,
    kernel: Int8Kernel,
    dtype: torch.dtype,
    place: Place,
) -> None:
    """Give an empty model its weights; ``place`` says for a module on which device.

    The layers of ``recipe`` are quantised as they come, or were ``stored`` so: no weight of theirs is in memory in full
    precision but the one at hand. Everything else becomes ``dtype``.

    Raises:
        InputError: tensors that are missing, unknown or of another shape.
    """
    layers = quantised_modules(model, recipe)
    plain = {name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in layers}
    tied = model.config.tie_word_embeddings and HEAD not in layers
    if tied:
        plain.discard(f"{HEAD}.weight")
    parts = {name: _parts(layer, recipe.name if recipe and stored else None) for name, layer in layers.items()}
    _check_names(tensors, {*plain, *(f"{module}.{part}" for module, those in parts.items() for part in those)})
    with Progress("loading", len(tensors.files)) as progress:
        # A tensor is here and in its mapped file while it is copied: the largest come while there is little else.
        for name in sorted(plain, key=lambda name: (-model.get_parameter(name).numel(), name)):
            module, _, leaf = name.rpartition(".")
            owner = model.get_submodule(module)
            value = tensors.read(name, place(module), dtype)
            _check_shape(name, value, getattr(owner, leaf))
            setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
            progress.advance()
        for module, layer in layers.items():
            assert recipe is not None
            own = {part: tensors.read(f"{module}.{part}", place(module)) for part in parts[module]}
            _check_shape(f"{module}.weight", own["weight"], layer.weight, halved=stored and recipe.name == "nf4")
            make = stored_linear if stored else quantised_linear
            model.set_submodule(module, make(own, recipe.name, kernel, dtype))
            progress.advance(len(own))
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb.to(place("model.embed_tokens"))
    model.eval()  # in training bitsandbytes leaves the activations of a CPU as they are


def _parts(layer: nn.Linear, stored: Quant | None) -> tuple[str, ...]:
    """Names of a layer's tensors, after its own."""
    weight = STORED_PARTS[stored] if stored else ("weight",)
    return weight if layer.bias is None else (*weight, "bias")


def _check_names(tensors: TensorSource, expected: set[str]) -> None:
    faults = sorted(expected ^ set(tensors.files))
    if faults:
        raise InputError(
            f"{tensors.directory}: the weights do not fit the model: {faults[0]} is "
            f"{'missing' if faults[0] in expected else 'unknown'} ({len(faults)} in all); make the artifact again"
        )


def _check_shape(name: str, found: torch.Tensor, expected: torch.Tensor, halved: bool = False) -> None:
    fits = 2 * found.numel() == expected.numel() if halved else found.shape == expected.shape
    if not fits:
        raise InputError(
            f"{name} has shape {tuple(found.shape)}, the model has {tuple(expected.shape)}; make the artifact again"
        )
