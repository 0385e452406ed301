"""Buffers that grow a part at a time hold what was written, whatever happens to their rows meanwhile."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pos2d.runtime.backends.onnx.rows import OnnxRows
from pos2d.runtime.backends.torch.rows import TorchRows
from pos2d.runtime.engine.backend import KVFormat
from pos2d.runtime.engine.row_buffers import LEAD, STEP, RowBuffers

Array = npt.NDArray[Any]
HEADS, HEAD_DIM, LAYERS = 2, 3, 4


def onnx_rows() -> OnnxRows:
    names = [f"past.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    return OnnxRows({name: ["batch", HEADS, "capacity", HEAD_DIM] for name in names}, "float32")


def torch_rows() -> TorchRows:
    return TorchRows(KVFormat(LAYERS, HEADS, HEAD_DIM, "float32", "pt"), [torch.device("cpu")] * LAYERS)


class Mirror:
    """The same operations on rows and on a list of arrays ``[N, K, T, D]``, one for every row."""

    def __init__(self, rows: RowBuffers, seed: int) -> None:
        self.rows, self.random = rows, np.random.default_rng(seed)
        self.kept: list[Array] = []

    def add(self) -> None:
        self.rows.add(int(self.random.choice([0, 10, 70])))
        self.kept.append(self._tokens(0))

    def drop(self) -> None:
        row, last = int(self.random.integers(len(self.kept))), len(self.kept) - 1
        if row != last:
            self.rows.move(last, row)
        self.rows.pop()
        self.kept[row] = self.kept[last]
        self.kept.pop()

    def swap(self) -> None:
        first, second = (int(self.random.integers(len(self.kept))) for _ in range(2))
        if first != second:
            self.rows.swap(first, second)
            self.kept[first], self.kept[second] = self.kept[second], self.kept[first]

    def put(self) -> None:
        row = int(self.random.integers(len(self.kept)))
        self.kept[row] = self._tokens(int(self.random.integers(1, 80)))
        arrays = {name: self.kept[row][index] for index, name in enumerate(self.rows.buffers)}
        self.rows.put(row, {name: as_kind(array, self.rows) for name, array in arrays.items()})

    def write(self) -> None:
        """Append tokens to all rows, as a forward pass does."""
        count = int(self.random.integers(1, 9))
        self.rows.rows(0, len(self.kept)).reserve(int(self.rows.lengths.max()) + count)
        for row, length in enumerate(self.rows.lengths.tolist()):
            new = self._tokens(count)
            for index, buffer in enumerate(self.rows.buffers.values()):
                buffer[row, :, length : length + count] = as_kind(new[index], self.rows)
            self.kept[row] = np.concatenate([self.kept[row], new], axis=2)
        self.rows.lengths = self.rows.lengths + count

    def check(self) -> None:
        assert self.rows.lengths.tolist() == [tokens.shape[2] for tokens in self.kept]
        for row, tokens in enumerate(self.kept):
            taken = self.rows.take(row, tokens.shape[2])
            assert all(np.array_equal(np.asarray(taken[name]), tokens[i]) for i, name in enumerate(self.rows.buffers))

    def _tokens(self, count: int) -> Array:
        return self.random.normal(size=(2 * LAYERS, HEADS, count, HEAD_DIM)).astype(np.float32)


def as_kind(array: Array, rows: RowBuffers) -> Any:
    return torch.from_numpy(array.copy()) if isinstance(rows, TorchRows) else array


@pytest.mark.parametrize("new_rows", [onnx_rows, torch_rows])
def test_rows_hold_what_was_written_while_their_buffers_grow(new_rows: Any) -> None:
    for seed in range(6):
        mirror = Mirror(new_rows(), seed)
        for _ in range(150):
            changes = [mirror.add] if len(mirror.kept) < 2 else [mirror.add, mirror.drop, mirror.swap, mirror.put]
            if not mirror.kept or mirror.random.random() < 0.2:
                mirror.random.choice(changes)()  # type: ignore[arg-type]
            else:
                mirror.write()
            mirror.check()


def test_the_copy_is_spread_over_the_passes_before_it_is_needed() -> None:
    """Just before buffers are full, all larger ones are there, and no pass has made more than a few of them."""
    rows, made = onnx_rows(), list[int]()
    rows.add(STEP)
    capacity = rows.capacity
    zeros_made = 0
    new_buffer = rows.new_buffer

    def counted(name: str, room: int, capacity: int) -> Array:
        nonlocal zeros_made
        zeros_made += 1
        return new_buffer(name, room, capacity)

    rows.new_buffer = counted  # type: ignore[method-assign]
    for length in range(capacity + 1):
        before = zeros_made
        rows.rows(0, 1).reserve(length + 1)
        rows.lengths = np.array([length + 1])
        made.append(zeros_made - before)
    assert rows.capacity > capacity
    assert sum(made) == 2 * LAYERS
    assert max(made) <= -(-2 * LAYERS // LEAD) + 1
    assert sum(made[: capacity - LEAD]) == 0
