"""Reads files of ``torch.save`` as dictionaries of tensors: mapped, not loaded, and without running code."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

from pos2d.errors import InputError, UnsafeInputError
from pos2d.sources.files.pickle_guard import check_pickle

if TYPE_CHECKING:
    import torch


def read_pth(path: Path) -> "dict[str, torch.Tensor]":
    """Name to tensor; the bytes stay in the file until they are used.

    Raises:
        InputError: the file is damaged, or is not a dictionary of tensors.
        UnsafeInputError: it would run code.
    """
    return tensors_of(load_pth(path), path)


def load_pth(path: Path) -> object:
    """Whatever plain values a file of ``torch.save`` holds; raises as :func:`read_pth`, but for the dictionary."""
    check_pickle(path)
    import torch

    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError:
        raise UnsafeInputError(f"{path} names an object that is not a plain tensor; do not load it") from None
    except Exception as error:  # torch lets many kinds of error through when an archive is damaged
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} is damaged: {reason}") from None
    return content


def tensors_of(content: object, path: Path) -> "dict[str, torch.Tensor]":
    """Name to tensor of what ``path`` holds; raises InputError if it is not a dictionary of tensors."""
    import torch

    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise InputError(f"{path} does not hold a dictionary of tensors")
    return {str(name): tensor.detach() for name, tensor in content.items()}


def check_storage(tensors: "Mapping[str, torch.Tensor]", path: Path) -> None:
    """Check that no tensor claims more bytes than the file stores for it, which would allocate memory without limit.

    Raises:
        InputError: one does; the message names the tensor.
    """
    import torch

    for name, tensor in tensors.items():
        if tensor.layout is torch.strided and tensor.nbytes > tensor.untyped_storage().nbytes():
            raise InputError(
                f"{path}: tensor {name} claims to be larger than what the file stores for it; save it again"
            )
