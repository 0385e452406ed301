"""Refuses sums of adapters that nobody trained: of whole modules, of rows, and of DoRA with another adapter."""

from collections.abc import Sequence
from itertools import combinations

from pos2d.errors import InputError
from pos2d.sources.adapters.adapter import Adapter
from pos2d.sources.adapters.deltas import Delta, Dora, Replaced, ReplacedRows
from pos2d.sources.checkpoints.checkpoint import EMBEDDING, HEAD, Checkpoint
from pos2d.sources.files.tensor_io import opened, row_blocks

REASONS: dict[type[Delta], str] = {
    Replaced: "holds the whole of",
    ReplacedRows: "holds rows of",
    Dora: "rescales (use_dora)",
}


def check_sum(adapters: Sequence[Adapter], base: Checkpoint) -> None:
    """Check that the changes of ``adapters``, which are to be added up, do not depend on one another.

    Factors and biases of several adapters are a sum. A module that one of them holds in full, or rescales, is not.

    Raises:
        InputError: adapters that only make sense one after the other.
    """
    for one, other in combinations(adapters, 2):
        for name in one.deltas:
            if name in other.deltas:
                _check_pair(name, one, other, base)


def _check_pair(name: str, one: Adapter, other: Adapter, base: Checkpoint) -> None:
    for first, second in ((one, other), (other, one)):
        for delta in first.deltas[name]:
            reason = REASONS.get(type(delta))
            if reason is None or _apart(delta, second.deltas[name]) or _changes_nothing(delta, name, base):
                continue
            module = name.removesuffix(".weight")
            raise InputError(
                f"{first.name} {reason} {module}, which {second.name} changes too, so their sum is no model that was "
                "trained; if one of them was trained on the result of the other, give the later one as `then`"
            )


def _apart(delta: Delta, others: Sequence[Delta]) -> bool:
    """Whether ``delta`` replaces rows that no other delta touches."""
    if not isinstance(delta, ReplacedRows):
        return False
    rows = set(delta.indices.tolist())
    return all(isinstance(other, ReplacedRows) and rows.isdisjoint(other.indices.tolist()) for other in others)


def _changes_nothing(delta: Delta, name: str, base: Checkpoint) -> bool:
    """Whether ``delta`` holds the values of the base itself, which PEFT saves with some adapters."""
    import torch

    origin = EMBEDDING if name == HEAD and base.sizes.tied else name
    place = base.tensors[origin]
    if not isinstance(delta, Replaced) or tuple(delta.value.shape) != place.shape:
        return False
    with opened(base.directory, {place.file}) as files:
        blocks = row_blocks(files[place.file], origin, place)
        return all(bool(torch.equal(values, delta.value[rows].double())) for rows, _, values in blocks)
