"""Adapters that change the size of the vocabulary: tokens were added before the training, or rows were cut off."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pos2d.errors import InputError
from pos2d.sources.checkpoints.checkpoint import EMBED_TOKENS, EMBEDDING, HEAD, LM_HEAD, Checkpoint

if TYPE_CHECKING:
    import torch

CURE = "save it again with save_embedding_layers=True, or with embed_tokens and lm_head in modules_to_save"
# Factors whose number of rows or columns is that of the vocabulary: name, dimension.
FACTOR_DIMENSIONS = ((f"{EMBED_TOKENS}.lora_embedding_A", 1), (f"{LM_HEAD}.lora_B.weight", 0))


def resized(base: Checkpoint, vocab: int) -> Checkpoint:
    """``base`` as it is once an adapter has given embedding and head ``vocab`` rows."""
    tensors = dict(base.tensors)
    for name in {EMBEDDING, HEAD} & set(tensors):
        place = tensors[name]
        rows = place.shape[0] if place.stored_rows is None else place.stored_rows
        tensors[name] = replace(place, shape=(vocab, *place.shape[1:]), stored_rows=rows)
    config = {**base.config, "vocab_size": vocab}
    padding = config.get("pad_token_id")
    if isinstance(padding, int) and padding >= vocab:
        config["pad_token_id"] = None  # loaders refuse a padding token without a row
    return replace(base, config=config, sizes=replace(base.sizes, vocab=vocab), tensors=tensors)


def vocabulary_of(tensors: "Mapping[str, torch.Tensor]", base: Checkpoint, file: Path, weight: float) -> int | None:
    """How many rows embedding and head have with an adapter, whose ``tensors`` have their plain names.

    None if that is the number of the base.

    Raises:
        InputError: the adapter changes the number of rows, but does not say so of both matrices, lacks their values, or
            is to be weighted.
    """
    before = base.sizes.vocab
    whole = {name: len(tensors[name]) for name in (EMBEDDING, HEAD) if name in tensors and tensors[name].dim() == 2}
    factors = {
        name: int(tensors[name].shape[dim])
        for name, dim in FACTOR_DIMENSIONS
        if name in tensors and tensors[name].dim() == 2
    }
    sizes = {rows for rows in (*whole.values(), *factors.values()) if rows != before}
    if not sizes:
        return None
    after = sizes.pop()
    start = f"{file} changes the vocabulary from {before} to {after} rows"
    _check_complete(start, after, sizes, whole, factors, base)
    if weight != 1:
        raise InputError(
            f"{start}, and the base has no values for part of them that a weight could scale; use weight 1"
        )
    return after


def _check_complete(
    start: str,
    after: int,
    sizes: Collection[int],
    whole: Mapping[str, int],
    factors: Mapping[str, int],
    base: Checkpoint,
) -> None:
    named = {**whole, **factors}
    others = sorted(name for name, rows in named.items() if rows != after)
    if sizes or others:
        differing = ", ".join(f"{name} has {named[name]}" for name in others)
        raise InputError(f"{start}, but {differing}; embedding and head must have the same number of rows, {CURE}")
    missing = [name for name in (EMBEDDING, HEAD) if name not in whole]
    if len(missing) == 2 or (missing and not base.sizes.tied):
        raise InputError(f"{start}, but does not have the new values of {' and '.join(missing)}; {CURE}")


def check_replaced(replaced: Collection[str], file: Path, vocab: int) -> None:
    """Check that an adapter with another vocabulary has new values for both matrices.

    Raises:
        InputError: it does not.
    """
    missing = [name for name in (EMBEDDING, HEAD) if name not in replaced]
    if missing:
        raise InputError(
            f"{file} has a vocabulary of {vocab} rows, but no new values of {' and '.join(missing)}; {CURE}"
        )
