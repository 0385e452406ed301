"""Keys and values of the tokens of one sequence, in buffers that ONNX Runtime reads and writes in place."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from pos2d.layout import Ints
from pos2d.onnx_io import PAST_PREFIX, present_of
from pos2d.runtime.engine.backend import KVArrays
from pos2d.runtime.engine.row_buffers import enlarged


class OnnxCache:
    """Buffers ``[1, K, capacity, D]`` for the keys and the values of every layer, each bound as past and as present.

    ``lengths`` ``[1]`` is the number of tokens; slots beyond them are never read, or masked. On the CPU, reserved slots
    cost no memory before they are written.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int | str]], dtype: str, device: str, capacity: int) -> None:
        self.lengths: Ints = np.zeros(1, dtype=np.int64)
        self.capacity = 0
        self._shapes = {name: (int(shape[1]), int(shape[3])) for name, shape in shapes.items()}
        self._dtype, self._device = dtype, device
        self._buffers: dict[str, ort.OrtValue] = {}
        # On the CPU, the memory of the buffers.
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        self.reserve(capacity)

    @property
    def length(self) -> int:
        """The number of tokens."""
        return int(self.lengths[0])

    @property
    def version(self) -> int:
        """Changes whenever the buffers are replaced."""
        return self.capacity

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens."""
        if capacity > self.capacity:
            self.capacity = enlarged(self.capacity, capacity)
            self._buffers = {name: self._enlarged(name) for name in self._shapes}

    def rewind(self, length: int) -> None:
        self.lengths = np.minimum(self.lengths, length)

    def take(self, length: int) -> dict[str, npt.NDArray[Any]]:
        """Copies of the keys and values of the first ``length`` tokens."""
        return {short_name(past): self._array(past)[0, :, :length].copy() for past in self._shapes}

    def put(self, arrays: KVArrays) -> None:
        """Hold exactly these keys and values ``[K, T, D]``."""
        length = next(iter(arrays.values())).shape[1]
        self.reserve(length)
        for past, buffer in self._buffers.items():
            array = self._array(past)
            array[0, :, :length] = arrays[short_name(past)]
            if past not in self._arrays:
                buffer.update_inplace(array)
        self.lengths = np.array([length], dtype=np.int64)

    def bind(self, binding: Any) -> None:
        """Bind every buffer as the past input and the present output of a session."""
        for name, buffer in self._buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(present_of(name), buffer)

    def _enlarged(self, name: str) -> ort.OrtValue:
        """A buffer of the new capacity with the content of the old one."""
        heads, head_dim = self._shapes[name]
        array = np.zeros((1, heads, self.capacity, head_dim), dtype=self._dtype)
        if name in self._buffers and self.length:
            array[:, :, : self.length] = self._array(name)[:, :, : self.length]
        if self._device == "cpu":  # the OrtValue shares this array's memory
            self._arrays[name] = array
        return ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)

    def _array(self, name: str) -> npt.NDArray[Any]:
        """A buffer's content: its own memory on the CPU, a copy elsewhere."""
        return self._arrays[name] if name in self._arrays else self._buffers[name].numpy()


def short_name(past: str) -> str:
    """The name that :func:`pos2d.runtime.engine.backend.kv_name` gives to what a cache input holds."""
    return f"layer.{past.removeprefix(PAST_PREFIX)}"
