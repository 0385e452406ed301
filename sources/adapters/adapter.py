"""An adapter in the one form that all readers return: deltas by tensor name, checked to fit a base."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pos2d.errors import InputError
from pos2d.sources.adapters.deltas import Delta
from pos2d.sources.files.pth import check_storage

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """``deltas`` maps the base's tensor names (``model.layers.0.self_attn.q_proj.weight``) to what is added to them.

    ``form``: ``trainer`` (its LoRA file), ``state dict`` (its full fine-tune), ``peft`` or ``mlx``. ``sha256``: of the
    weights; ``config_sha256``: of the configuration. ``weight`` scales all deltas; 1 is the adapter as trained.
    ``step``: its place in a chain of adapters, 0 for those that are trained on the base itself. ``vocab``: how many
    rows embedding and head have with it, where it changes that; None where it does not.
    """

    path: Path
    form: str
    sha256: str
    weight: float
    deltas: Mapping[str, tuple[Delta, ...]]
    config_sha256: str | None = None
    step: int = 0
    vocab: int | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """What a manifest calls it: the name of its file or directory, or its id and commit on the Hub."""
        return self.label or self.path.name

    @property
    def ranks(self) -> list[int]:
        """Every rank that occurs, ascending."""
        return sorted({delta.rank for deltas in self.deltas.values() for delta in deltas if delta.rank is not None})

    def to_dict(self) -> dict[str, Any]:
        return {
            "file": self.name,
            "form": self.form,
            "sha256": self.sha256,
            "config_sha256": self.config_sha256,
            "weight": self.weight,
            "ranks": self.ranks,
            "tensors": len(self.deltas),
            **({"step": self.step} if self.step else {}),
        }

    def at_step(self, step: int) -> "Adapter":
        """The same adapter at another place in a chain."""
        deltas = {name: tuple(replace(delta, step=step) for delta in added) for name, added in self.deltas.items()}
        return replace(self, step=step, deltas=deltas)


def first_names(names: list[str]) -> str:
    """The first three of ``names`` and the number of the others, for a sentence."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def module_kind(module: str) -> str:
    """``q_proj`` of ``model.layers.0.self_attn.q_proj``."""
    return module.rsplit(".", 1)[-1]


def refuse_empty(shapes: Mapping[str, Sequence[int]], path: Path) -> None:
    """Check that no tensor is without values, which is what DeepSpeed's ZeRO-3 leaves of those it has not gathered.

    Raises:
        InputError: one is.
    """
    empty = sorted(name for name, shape in shapes.items() if 0 in shape)
    if empty:
        raise InputError(
            f"{path}: {len(empty)} of {len(shapes)} tensors are empty, such as {empty[0]}: DeepSpeed ZeRO-3 saved the "
            "adapter without gathering it; gather the checkpoint with its zero_to_fp32.py, or save the adapter again "
            "with stage3_gather_16bit_weights_on_model_save"
        )


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
