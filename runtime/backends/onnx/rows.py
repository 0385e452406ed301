"""Keys and values of many sequences in one buffer for each layer, whose rows ONNX Runtime reads and writes in place."""

import math
import mmap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from pos2d.onnx_io import present_of
from pos2d.runtime.backends.onnx.kv_cache import short_name
from pos2d.runtime.engine.row_buffers import RowBuffers, RowSpan

Array = npt.NDArray[Any]


class OnnxRows(RowBuffers):
    """Rows in arrays of numpy, in the CPU's memory.

    Neighbouring rows are one piece of memory, so a forward pass over some of them copies nothing. What is reserved
    costs no memory before it is written. ``shapes`` are those of the graph's cache inputs, by name.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int | str]], dtype: str) -> None:
        self._past_names = {short_name(past): past for past in shapes}
        self._sizes = {short_name(past): (int(shape[1]), int(shape[3])) for past, shape in shapes.items()}
        self._dtype = dtype
        self._views: dict[tuple[int, int], OnnxRowsView] = {}
        super().__init__(self._sizes)

    def new_buffer(self, name: str, room: int, capacity: int) -> Array:
        heads, head_dim = self._sizes[name]
        return zeros((room, heads, capacity, head_dim), self._dtype)

    def copied(self, tokens: Array) -> Array:
        return tokens.copy()

    def replacing(self) -> None:
        super().replacing()
        self._views.clear()

    def rows(self, first: int, stop: int) -> "OnnxRowsView":
        return self._views.setdefault((first, stop), OnnxRowsView(self, first, stop))

    def values(self, rows: slice) -> dict[str, ort.OrtValue]:
        """The buffers of some rows, by the name of the graph's input; they share the memory of this object."""
        return {
            self._past_names[name]: ort.OrtValue.ortvalue_from_numpy(buffer[rows], "cpu", 0)
            for name, buffer in self.buffers.items()
        }


def zeros(shape: tuple[int, ...], dtype: str) -> Array:
    """An array of zeros in pages of its own, which take no time and no memory before they are used.

    :func:`numpy.zeros` clears memory that was used before, which takes as long as several steps for a long prompt.

    Raises:
        MemoryError: there is not enough.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        pages = mmap.mmap(-1, max(1, size))
    except OSError as error:
        raise MemoryError(f"no memory for {size} bytes of keys and values") from error
    return np.frombuffer(pages, dtype=dtype, count=math.prod(shape)).reshape(shape)


class OnnxRowsView(RowSpan):
    """Some neighbouring rows as the cache of a forward pass."""

    _rows: OnnxRows

    @property
    def version(self) -> int:
        return self._rows.version

    def bind(self, binding: Any) -> None:
        """Bind every buffer as the past input and the present output of a session."""
        self._values = self._rows.values(self._span)
        for name, value in self._values.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(present_of(name), value)
