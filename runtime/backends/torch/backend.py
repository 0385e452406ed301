"""Merged and bitsandbytes artifacts on torch, with this package's model classes; no code of the artifact is run."""

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from threading import Lock
from typing import Self

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from pos2d.layout import Bools, Ints
from pos2d.memory_costs import TORCH_PREFILL_CHUNK
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.backends.torch.bitsandbytes_library import errors_only
from pos2d.runtime.backends.torch.cuda_graphs import GraphedCache, Tensors
from pos2d.runtime.backends.torch.decoder import load_decoder
from pos2d.runtime.backends.torch.devices import DeviceMap, device_lookup
from pos2d.runtime.backends.torch.kv_cache import FixedCache, GrowingCache
from pos2d.runtime.backends.torch.linears import bnb_layers
from pos2d.runtime.backends.torch.rows import TorchRows, TorchRowsView
from pos2d.runtime.engine.backend import Floats, KVFormat
from pos2d.runtime.opening.opened_model import OpenedModel


class TorchBackend:
    """One decoder on one device, or on several by a device map; threads may share it, each with caches of its own."""

    prefill_chunk = TORCH_PREFILL_CHUNK

    def __init__(self, model: PreTrainedModel, device_map: DeviceMap) -> None:
        self._model = model
        # Layers of bitsandbytes keep values between their steps, and nothing may run while a CUDA graph is captured.
        self._lock = Lock()
        device_of = device_lookup(device_map)
        self._device = device_of("model.embed_tokens")
        self._layer_devices = [device_of(f"model.layers.{layer}") for layer in range(model.config.num_hidden_layers)]
        self.device = self._device.type
        self.dtype: torch.dtype = model.get_input_embeddings().weight.dtype
        foreign = bnb_layers(model)
        self._uses_bitsandbytes = bool(foreign)
        # bitsandbytes' int8 layer branches on the values of its activations, which a CUDA graph cannot capture.
        on_one_gpu = device_map == {"": self._device} and self._device.type == "cuda"
        self._uses_cuda_graphs = on_one_gpu and "Linear8bitLt" not in foreign

    @classmethod
    def load(cls, opened: OpenedModel, options: LoadOptions) -> Self:
        """Load an artifact, or a model whose weights are added up while they are loaded.

        Raises: as :func:`pos2d.load`.
        """
        return cls(*load_decoder(opened, options))

    @property
    def arithmetic(self) -> Mapping[str, str]:
        # The classes of the linear layers say how they are quantised, and whether their activations are.
        linears = Counter(type(layer).__name__ for layer in self._model.modules() if hasattr(layer, "weight"))
        return {
            "backend": "torch",
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": ",".join(sorted({device.type for device in self._layer_devices})),
            "attention": self._model.config._attn_implementation,
            "layers": ",".join(f"{name} {count}" for name, count in sorted(linears.items())),
        }

    @property
    def kv_format(self) -> KVFormat:
        config = self._model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dtype = str(self.dtype).removeprefix("torch.")
        return KVFormat(config.num_hidden_layers, config.num_key_value_heads, head_dim, dtype, "pt")

    def expect_branches(self, count: int) -> None:
        """Do nothing: the model runs any number of branches."""

    def load_for(self, count: int) -> None:
        """Do nothing: the model is loaded as a whole."""

    def new_cache(self, capacity: int) -> Cache:
        if self._uses_cuda_graphs:
            return GraphedCache(capacity, self._device)
        return GrowingCache(capacity, self._layer_devices)

    def new_rows(self) -> TorchRows:
        return TorchRows(self.kv_format, self._layer_devices)

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Ints,
        position_ids: Ints,
        pos2d: Ints,
        mask: Bools,
        cache: Cache | None = None,
        rows: Ints | None = None,
        counts: Ints | None = None,
    ) -> Floats:
        # The model takes the same tokens of every sequence; those of several sequences are picked afterwards.
        of_each = rows if rows is not None and rows.ndim == 2 and len(rows) > 1 else None
        of_all = None if rows is None or of_each is not None else rows.reshape(-1)
        inputs = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "pos2d": pos2d,
            "attention_mask": mask[:, None],
            **({} if of_all is None else {"logits_to_keep": of_all}),
        }
        tensors = {name: torch.tensor(values, device=self._device) for name, values in inputs.items()}
        # bitsandbytes logs every cast of every layer.
        with self._lock, errors_only() if self._uses_bitsandbytes else nullcontext():
            if isinstance(cache, TorchRowsView):
                cache.reserve(mask.shape[-1])
            if isinstance(cache, FixedCache):
                logits = self._forward_fixed(cache, tensors)
            else:
                logits = self._model(**tensors, past_key_values=cache, use_cache=cache is not None).logits
        if isinstance(cache, TorchRowsView):
            cache.lengths = cache.lengths + (input_ids.shape[1] if counts is None else counts)
        result: Floats = logits.float().cpu().numpy()
        return result if of_each is None else np.take_along_axis(result, of_each[..., None], axis=1)

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
