"""The place of a tensor in a file, and names of its dtype."""

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from pos2d.dtypes import ITEM_BYTES, SAFETENSORS_NAMES, TORCH_NAMES

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A tensor's file in the checkpoint, its shape, its safetensors dtype and its first byte in the file.

    ``offset`` has no meaning in a file of ``torch.save``. ``stored_rows``: how many rows the file has, where an adapter
    changed their number and ``shape`` is that of the result.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0
    stored_rows: int | None = None

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]

    @property
    def kept_rows(self) -> int:
        """How many of the file's rows the result has as well; a vector has one row an element."""
        rows = self.shape[0]
        return rows if self.stored_rows is None else min(rows, self.stored_rows)

    @property
    def kept_nbytes(self) -> int:
        """Bytes of the rows that the result has as well."""
        return self.nbytes if self.stored_rows is None else self.kept_rows * self.nbytes // self.shape[0]


def torch_dtype(safetensors: str) -> "torch.dtype":
    """torch's dtype for a safetensors name."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[safetensors])
    return dtype


def torch_name(safetensors: str) -> str:
    """torch's name for a safetensors dtype; an unknown dtype keeps its safetensors name."""
    return TORCH_NAMES.get(safetensors, safetensors)


def safetensors_name(torch_name: str) -> str:
    """safetensors' name for a torch dtype (``torch.float16`` or ``float16``); an unknown dtype keeps torch's name."""
    name = torch_name.removeprefix("torch.")
    return SAFETENSORS_NAMES.get(name, name)
