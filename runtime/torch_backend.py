"""Merged directories on torch, with the model classes of this package (no code from the artifact is run)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import DynamicCache
from transformers.utils import logging

from pos2d.errors import InputError, UsageError
from pos2d.families import CLASS_NAMES
from pos2d.hf import modeling_pos2d
from pos2d.layout import Bools, Ints
from pos2d.manifest import Manifest
from runtime.backend import Floats

DTYPES = ("float32", "float16", "bfloat16")


class TorchBackend:
    """One decoder on one device; ``dtype`` ``auto`` keeps the stored type."""

    def __init__(self, directory: Path, manifest: Manifest, device: str, dtype: str) -> None:
        if dtype not in ("auto", *DTYPES):
            raise UsageError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
        self._device = _device(device)
        kind = getattr(modeling_pos2d, f"{CLASS_NAMES[manifest.family]}ForCausalLM")
        with _quiet_loading():
            self._model, loading = kind.from_pretrained(
                directory, dtype=dtype if dtype == "auto" else getattr(torch, dtype), output_loading_info=True
            )
        faults = {key: sorted(map(str, loading[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        if any(faults.values()):
            raise InputError(f"{directory}: the weights do not fit the model: {faults}; make the artifact again")
        self._model.eval().to(self._device)

    def new_cache(self) -> DynamicCache:
        return DynamicCache()

    @torch.inference_mode()
    def forward(
        self, input_ids: Ints, position_ids: Ints, pos2d: Ints, mask: Bools, cache: DynamicCache | None = None
    ) -> Floats:
        logits = self._model(
            input_ids=torch.tensor(input_ids, device=self._device),
            position_ids=torch.tensor(position_ids, device=self._device),
            pos2d=torch.tensor(pos2d, device=self._device),
            attention_mask=torch.tensor(mask, device=self._device)[:, None],
            past_key_values=cache,
            use_cache=cache is not None,
        ).logits
        result: Floats = logits.float().cpu().numpy()
        return result


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """transformers draws a bar on standard error even where that is not a terminal; leave its setting as it was."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device
