"""Merged and bitsandbytes artifacts on torch, with this package's model classes; no code of the artifact is run."""

from contextlib import nullcontext
from pathlib import Path
from threading import Lock
from typing import Self

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from pos2d.errors import UsageError
from pos2d.layout import Bools, Ints
from pos2d.manifest import Manifest
from pos2d.memory_costs import TORCH_PREFILL_CHUNK
from pos2d.recipes import BnbRecipe
from pos2d.runtime.backends.memory import check_memory
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.backends.torch.attention import NAME as COLUMNS
from pos2d.runtime.backends.torch.bitsandbytes_library import errors_only
from pos2d.runtime.backends.torch.cuda_graphs import GraphedCache, Tensors
from pos2d.runtime.backends.torch.devices import DeviceMap, device_lookup, infer_device_map, one_device
from pos2d.runtime.backends.torch.kv_cache import FixedCache, GrowingCache
from pos2d.runtime.backends.torch.linears import bnb_layers
from pos2d.runtime.backends.torch.loading import (
    CONFIG,
    HEAD,
    config_of_artifact,
    empty_decoder,
    fill_decoder,
    sized_decoder,
    stored_tensors,
)
from pos2d.runtime.engine.backend import Floats
from pos2d.threads import default_threads


class TorchBackend:
    """One decoder on one device, or on several by a device map; threads may share it, each with caches of its own."""

    prefill_chunk = TORCH_PREFILL_CHUNK

    def __init__(self, model: PreTrainedModel, device_map: DeviceMap) -> None:
        self._model = model
        # Layers of bitsandbytes keep values between their steps, and nothing may run while a CUDA graph is captured.
        self._lock = Lock()
        self._device = device_lookup(device_map)("model.embed_tokens")
        self.device = self._device.type
        self.dtype: torch.dtype = model.get_input_embeddings().weight.dtype
        foreign = bnb_layers(model)
        self._uses_bitsandbytes = bool(foreign)
        # bitsandbytes' int8 layer branches on the values of its activations, which a CUDA graph cannot capture.
        on_one_gpu = device_map == {"": self._device} and self._device.type == "cuda"
        self._uses_cuda_graphs = on_one_gpu and "Linear8bitLt" not in foreign

    @classmethod
    def load(cls, directory: Path, manifest: Manifest, options: LoadOptions) -> Self:
        """Load an artifact.

        Raises: as :func:`pos2d.load`.
        """
        recipe = _recipe(directory, manifest, options)
        if options.int8_kernel != "auto" and (recipe is None or recipe.name != "8bit"):
            raise UsageError(
                f"`int8_kernel` is for 8 bits, which {directory} does not have; leave it out, or use `quant='8bit'`"
            )
        device = one_device(options.device)
        torch.set_num_threads(options.threads or min(torch.get_num_threads(), default_threads()))
        dtype = _compute_dtype(manifest, options, recipe, device)
        if device.type == "cpu" and options.device_map is None:
            check_memory(directory, manifest, str(dtype).removeprefix("torch."), options.quant)
        attention = COLUMNS if options.attn_implementation == "sdpa" else "eager"
        config = config_of_artifact(directory, manifest)
        model = empty_decoder(config, manifest.family, attention, directory / CONFIG)
        device_map: DeviceMap = {"": device}
        if options.device_map is not None:
            unfilled = empty_decoder(config, manifest.family, "eager", directory / CONFIG)
            device_map = infer_device_map(sized_decoder(unfilled, recipe, dtype), options.max_memory)
        fill_decoder(
            model,
            stored_tensors(directory, manifest),
            recipe,
            stored=manifest.quant is not None,
            kernel=options.int8_kernel,
            dtype=dtype,
            device_of=device_lookup(device_map),
        )
        if len(set(device_map.values())) > 1:
            from accelerate import dispatch_model

            model = dispatch_model(model, device_map=device_map)
        return cls(model, device_map)

    def expect_branches(self, count: int) -> None:
        """Do nothing: the model runs any number of branches."""

    def new_cache(self, capacity: int) -> Cache:
        return GraphedCache(capacity) if self._uses_cuda_graphs else GrowingCache(capacity)

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Ints,
        position_ids: Ints,
        pos2d: Ints,
        mask: Bools,
        cache: Cache | None = None,
        rows: Ints | None = None,
    ) -> Floats:
        inputs = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "pos2d": pos2d,
            "attention_mask": mask[:, None],
            **({} if rows is None else {"logits_to_keep": rows}),
        }
        tensors = {name: torch.tensor(values, device=self._device) for name, values in inputs.items()}
        # bitsandbytes logs every cast of every layer.
        with self._lock, errors_only() if self._uses_bitsandbytes else nullcontext():
            if isinstance(cache, FixedCache):
                logits = self._forward_fixed(cache, tensors)
            else:
                logits = self._model(**tensors, past_key_values=cache, use_cache=cache is not None).logits
        result: Floats = logits.float().cpu().numpy()
        return result

    def _forward_fixed(self, cache: FixedCache, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """One pass over a cache whose unfilled slots are masked; on a GPU, decode steps run as CUDA graphs."""

        def step(inputs: Tensors) -> torch.Tensor:
            arguments = {name: tensor for name, tensor in inputs.items() if name != "slots"}
            logits: torch.Tensor = self._model(**arguments, past_key_values=cache, use_cache=True).logits
            return logits

        count = tensors["input_ids"].shape[1]
        mask = tensors["attention_mask"]
        tensors["attention_mask"] = functional.pad(mask, (0, cache.capacity - mask.shape[-1]))
        tensors["slots"] = torch.arange(cache.length, cache.length + count, device=self._device)
        if isinstance(cache, GraphedCache) and cache.length > 0 and "logits_to_keep" not in tensors:
            logits = cache.run(step, tensors)
        else:
            cache.slots = tensors["slots"]
            logits = step(tensors)
        cache.length += count
        return logits


def _recipe(directory: Path, manifest: Manifest, options: LoadOptions) -> BnbRecipe | None:
    """How the model is quantised: as the artifact is, or while it is loaded.

    Raises:
        UsageError: the artifact is quantised in another way.
    """
    if manifest.quant is None:
        return None if options.quant is None else BnbRecipe(options.quant, (HEAD,))
    if options.quant not in (None, manifest.quant.name):
        raise UsageError(
            f"{directory} is quantised to {manifest.quant.name}; `quant='{options.quant}'` needs a merged artifact"
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
