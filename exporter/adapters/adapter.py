"""An adapter in the one form that all readers return: deltas by tensor name, checked to fit a base."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pos2d.errors import InputError
from pos2d.exporter.adapters.deltas import Delta
from pos2d.exporter.files.pth import check_storage

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """``deltas`` maps the base's tensor names (``model.layers.0.self_attn.q_proj.weight``) to what is added to them.

    ``form``: ``trainer`` (its LoRA file), ``state dict`` (its full fine-tune) or ``peft``. ``sha256``: of the file of
    weights; ``config_sha256``: of PEFT's configuration. ``weight`` scales all deltas; 1 is the adapter as trained.
    """

    path: Path
    form: str
    sha256: str
    weight: float
    deltas: Mapping[str, tuple[Delta, ...]]
    config_sha256: str | None = None

    @property
    def ranks(self) -> list[int]:
        """Every rank that occurs, ascending."""
        return sorted({delta.rank for deltas in self.deltas.values() for delta in deltas if delta.rank is not None})

    def to_dict(self) -> dict[str, Any]:
        return {
            "file": self.path.name,
            "form": self.form,
            "sha256": self.sha256,
            "config_sha256": self.config_sha256,
            "weight": self.weight,
            "ranks": self.ranks,
            "tensors": len(self.deltas),
        }


def first_names(names: list[str]) -> str:
    """The first three of ``names`` and the number of the others, for a sentence."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def module_kind(module: str) -> str:
    """``q_proj`` of ``model.layers.0.self_attn.q_proj``."""
    return module.rsplit(".", 1)[-1]


def check_values(tensors: "Mapping[str, torch.Tensor]", path: Path) -> None:
    """Check that all tensors of an adapter are dense, floating point and finite.

    Raises:
        InputError: one that is not; the message names the tensor.
    """
    import torch

    check_storage(tensors, path)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.layout is not torch.strided:
            raise InputError(f"{path}: tensor {name} is {tensor.dtype}, not a dense floating-point tensor")
        # torch has no isfinite for some one-byte types.
        values = tensor.float() if tensor.itemsize == 1 else tensor
        if not values.isfinite().all():
            raise InputError(
                f"{path}: tensor {name} has NaN or infinite values; the training diverged, use an earlier file"
            )
