"""ONNX artifacts on ONNX Runtime, driven by the inputs and outputs that the manifest names."""

from pathlib import Path

import numpy as np
import onnxruntime as ort

from pos2d.errors import InputError, UsageError
from pos2d.layout import Bools, Ints
from pos2d.manifest import Manifest
from runtime.backend import Floats
from runtime.backends.memory import check_memory
from runtime.options import LoadOptions

PAST, PRESENT = "past_key_values.", "present."


class OnnxCache:
    """Keys and values of the tokens so far, by input name; they stay ONNX Runtime's own values between steps."""

    def __init__(self, values: dict[str, ort.OrtValue]) -> None:
        self.values = values

    def reserve(self, capacity: int) -> None:
        """Nothing: every step makes its own."""

    def rewind(self, length: int) -> None:
        if any(value.shape()[2] > length for value in self.values.values()):
            self.values = {name: _first(value, length) for name, value in self.values.items()}


class OnnxBackend:
    """One float32 decoder on the CPU."""

    def __init__(self, directory: Path, manifest: Manifest, options: LoadOptions) -> None:
        if options.device not in ("auto", "cpu"):
            raise UsageError(f"device {options.device!r}: ONNX artifacts run on the CPU; leave --device out")
        if options.dtype not in ("auto", "float32"):
            raise UsageError(f"dtype {options.dtype!r}: this ONNX artifact computes in float32; leave --dtype out")
        if options != LoadOptions(device=options.device, dtype=options.dtype):
            raise UsageError(
                f"{directory} is an ONNX artifact; --quant, --int8-kernel, --attn-implementation, --device-map and "
                "--max-memory are for merged and bnb ones"
            )
        check_memory(directory, manifest, manifest.dtype)
        graph = manifest.graph or {}
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(
                directory / graph["file"], settings, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime has no public error class
            raise InputError(f"{directory / graph['file']} cannot be loaded: {error}; export it again") from None
        self._empty_shapes = {
            i["name"]: (i["shape"][1], 0, i["shape"][3]) for i in graph["inputs"] if i["name"].startswith(PAST)
        }

    def new_cache(self, capacity: int) -> OnnxCache:
        return OnnxCache({})

    def forward(
        self,
        input_ids: Ints,
        position_ids: Ints,
        pos2d: Ints,
        mask: Bools,
        cache: OnnxCache | None = None,
        rows: Ints | None = None,
    ) -> Floats:
        binding = self._session.io_binding()
        feeds = {"input_ids": input_ids, "position_ids": position_ids, "pos2d": pos2d, "attention_mask": mask[:, None]}
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        past = (cache.values if cache else None) or self._empty_past(len(input_ids))
        for name, value in past.items():
            binding.bind_ortvalue_input(name, value)
        outputs = ["logits", *(name.replace(PAST, PRESENT) for name in past if cache is not None)]
        for name in outputs:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        if cache is not None:
            cache.values = dict(zip(past, present, strict=True))
        result: Floats = logits.numpy()
        return result if rows is None else result[:, rows]

    def _empty_past(self, batch: int) -> dict[str, ort.OrtValue]:
        return {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros((batch, *shape), dtype=np.float32))
            for name, shape in self._empty_shapes.items()
        }


def _first(value: ort.OrtValue, length: int) -> ort.OrtValue:
    """The first ``length`` tokens of keys or values ``[B, K, T, D]``."""
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[:, :, :length]))
