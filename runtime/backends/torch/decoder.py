"""Loads the decoder of an opened model: which type and device it gets, and how it is quantised."""

from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pos2d.errors import UsageError
from pos2d.manifest import Manifest
from pos2d.recipes import BnbRecipe
from pos2d.runtime.backends.memory import check_memory
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.backends.torch.attention import NAME as COLUMNS
from pos2d.runtime.backends.torch.devices import DeviceMap, device_lookup, infer_device_map, one_device
from pos2d.runtime.backends.torch.loading import HEAD, empty_decoder, fill_decoder, sized_decoder
from pos2d.runtime.backends.torch.weights import opened_weights
from pos2d.runtime.opening.opened_model import OpenedModel
from pos2d.sources.checkpoints.weight_files import CONFIG
from pos2d.threads import default_threads


def load_decoder(opened: OpenedModel, options: LoadOptions) -> tuple[PreTrainedModel, DeviceMap]:
    """Load a model of our classes, and say where its modules are.

    Raises: as :func:`pos2d.load`.
    """
    place, manifest = opened.place, opened.manifest
    recipe = _recipe(place, manifest, options)
    if options.int8_kernel != "auto" and (recipe is None or recipe.name != "8bit"):
        raise UsageError(
            f"`int8_kernel` is for 8 bits, which {place} does not have; leave it out, or use `quant='8bit'`"
        )
    device = one_device(options.device)
    torch.set_num_threads(options.threads or min(torch.get_num_threads(), default_threads()))
    dtype = _compute_dtype(manifest, options, recipe, device)
    if device.type == "cpu" and options.device_map is None:
        check_memory(place, manifest, str(dtype).removeprefix("torch."), options.quant)
    attention = COLUMNS if options.attn_implementation == "sdpa" else "eager"
    with opened_weights(opened, options.dtype, quantised=options.quant is not None) as (config, tensors):
        empty = partial(empty_decoder, config, manifest.family, source=place / CONFIG)
        device_map: DeviceMap = {"": device}
        if options.device_map is not None:
            device_map = infer_device_map(sized_decoder(empty("eager"), recipe, dtype), options.max_memory)
        model = empty(attention)
        fill_decoder(
            model,
            tensors,
            recipe,
            stored=manifest.quant is not None,
            kernel=options.int8_kernel,
            dtype=dtype,
            device_of=device_lookup(device_map),
        )
    if len(set(device_map.values())) > 1:
        from accelerate import dispatch_model

        model = dispatch_model(model, device_map=device_map)
    return model, device_map


def _recipe(place: Path, manifest: Manifest, options: LoadOptions) -> BnbRecipe | None:
    """How the model is quantised: as the artifact is, or while it is loaded.

    Raises:
        UsageError: the artifact is quantised in another way.
    """
    if not isinstance(manifest.quant, BnbRecipe):
        return None if options.quant is None else BnbRecipe(options.quant, (HEAD,))
    if options.quant not in (None, manifest.quant.name):
        raise UsageError(
            f"{place} is quantised to {manifest.quant.name}; `quant='{options.quant}'` needs a merged artifact"
        )
    return manifest.quant


def _compute_dtype(
    manifest: Manifest, options: LoadOptions, recipe: BnbRecipe | None, device: torch.device
) -> torch.dtype:
    if options.dtype != "auto":
        chosen: torch.dtype = getattr(torch, options.dtype)
        return chosen
    # On CPUs the packed int8 product takes bfloat16 activations.
    packed = recipe is not None and recipe.name == "8bit" and device.type == "cpu" and options.int8_kernel != "bnb"
    stored: torch.dtype = getattr(torch, manifest.dtype)
    return torch.bfloat16 if packed else stored
