"""A head that shares the embedding's tensor, and adapters that change one of the two or both."""

from collections.abc import Mapping, Sequence

from pos2d.exporter.adapters.deltas import Change
from pos2d.exporter.inputs.checkpoint import EMBEDDING, HEAD, Checkpoint

Changes = Mapping[str, Sequence[Change]]


def stays_tied(base: Checkpoint, changes: Changes) -> bool:
    """Whether head and embedding are still one tensor after ``changes``.

    Training computes with the head and the embedding as each was changed, so a change of only one of them, or another
    change of each, makes them two tensors; written as one, a reload would overwrite one with the other.
    """
    return base.sizes.tied and _equal(changes.get(HEAD, ()), changes.get(EMBEDDING, ()))


def _equal(left: Sequence[Change], right: Sequence[Change]) -> bool:
    return len(left) == len(right) and all(_same(one, other) for one, other in zip(left, right, strict=True))


def _same(one: Change, other: Change) -> bool:
    import torch

    mine, theirs = one.tensors(), other.tensors()
    return (
        type(one) is type(other)
        and one.weight == other.weight
        and getattr(one, "scale", None) == getattr(other, "scale", None)
        and all(mine[name] is theirs[name] or torch.equal(mine[name], theirs[name]) for name in mine)
    )
