"""A head that shares the embedding's tensor, and adapters that change one of the two or both."""

import hashlib
from collections.abc import Mapping, Sequence

from exporter.adapters.changes import Change
from exporter.checkpoint import EMBEDDING, HEAD, Checkpoint, TensorPlace
from exporter.tensors import open_tensors, pieces
from pos2d.errors import InputError

Changes = Mapping[str, Sequence[Change]]
PIECE_BYTES = 4 << 20


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


def check_head(base: Checkpoint) -> None:
    """Some checkpoints hold a head although their configuration ties it to the embedding.

    Raises:
        InputError: the two differ. Releases of transformers do not agree on which of them such a model has.
    """
    if base.spare_head is None:
        return
    if _digest(base, HEAD, base.spare_head) != _digest(base, EMBEDDING, base.tensors[EMBEDDING]):
        raise InputError(
            f"{base.directory}: {HEAD} differs from {EMBEDDING}, which config.json ties it to; set tie_word_embeddings "
            "to false there to keep both, or remove the head"
        )


def _digest(base: Checkpoint, name: str, place: TensorPlace) -> str:
    file, digest = open_tensors(base.directory / place.file), hashlib.sha256(place.dtype.encode())
    for start, count in pieces(place.nbytes, PIECE_BYTES):
        buffer = memoryview(bytearray(count))
        file.read_into(name, place, start, buffer)
        digest.update(buffer)
    file.close()
    return digest.hexdigest()
