"""Decides whether a head that shares the embedding's tensor can still share it once adapters are merged."""

from collections.abc import Mapping, Sequence

from pos2d.sources.adapters.deltas import Delta
from pos2d.sources.checkpoints.checkpoint import EMBEDDING, HEAD, Checkpoint


def stays_tied(base: Checkpoint, deltas: Mapping[str, Sequence[Delta]]) -> bool:
    """Whether head and embedding are still one tensor once ``deltas``, by tensor name, are added.

    In training each has its own delta, so unless both deltas are equal they are two tensors afterwards; written as one,
    one of the two would be lost.
    """
    return base.sizes.tied and _equal(deltas.get(HEAD, ()), deltas.get(EMBEDDING, ()))


def _equal(left: Sequence[Delta], right: Sequence[Delta]) -> bool:
    return len(left) == len(right) and all(_same(one, other) for one, other in zip(left, right, strict=True))


def _same(one: Delta, other: Delta) -> bool:
    import torch

    left, right = one.tensors(), other.tensors()
    return (
        type(one) is type(other)
        and (one.weight, one.step) == (other.weight, other.step)
        and getattr(one, "scale", None) == getattr(other, "scale", None)
        and all(left[name] is right[name] or torch.equal(left[name], right[name]) for name in left)
    )
