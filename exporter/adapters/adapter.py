"""What every form of adapter becomes: changes by tensor name, checked to fit a base."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pos2d.errors import InputError
from pos2d.exporter.adapters.deltas import Change
from pos2d.exporter.files.pth import check_storage

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """``changes`` maps the base's tensor names (``model.layers.0.self_attn.q_proj.weight``) to what is done to them.

    ``form``: ``trainer`` (its LoRA file), ``state dict`` (its full fine-tune) or ``peft``. ``sha256`` is the weights
    file's, ``config_sha256`` that of PEFT's configuration. ``weight``: how much of it is wanted.
    """

    path: Path
    form: str
    sha256: str
    weight: float
    changes: Mapping[str, tuple[Change, ...]]
    config_sha256: str | None = None

    @property
    def ranks(self) -> list[int]:
        """Every rank that occurs, ascending."""
        return sorted({c.rank for changes in self.changes.values() for c in changes if c.rank is not None})

    def to_dict(self) -> dict[str, Any]:
        return {
            "file": self.path.name,
            "form": self.form,
            "sha256": self.sha256,
            "config_sha256": self.config_sha256,
            "weight": self.weight,
            "ranks": self.ranks,
            "tensors": len(self.changes),
        }


def some(names: list[str]) -> str:
    """The first of many names, for a sentence."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def kind(module: str) -> str:
    """``q_proj`` of ``model.layers.0.self_attn.q_proj``."""
    return module.rsplit(".", 1)[-1]


def check_values(tensors: "Mapping[str, torch.Tensor]", path: Path) -> None:
    """Raises:
    InputError: a tensor that is not dense floating point, or has values that are not finite.
    """
    import torch

    check_storage(tensors, path)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.layout is not torch.strided:
            raise InputError(f"{path}: tensor {name} is {tensor.dtype}, not a dense floating-point tensor")
        # Some types of one byte cannot be asked.
        values = tensor.float() if tensor.itemsize == 1 else tensor
        if not values.isfinite().all():
            raise InputError(
                f"{path}: tensor {name} has NaN or infinite values; the training diverged, use an earlier file"
            )
