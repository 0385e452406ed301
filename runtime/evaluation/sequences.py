"""The sequences in which a text is evaluated: one sample per sequence, or several samples side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from pos2d.errors import InputError, UsageError
from pos2d.layout import Ints, Layout, build_layout
from pos2d.manifest import Manifest
from pos2d.spec import Rope2DSpec
from pos2d.text_samples import FORMS, Branch, read_rows

# A sample is cut after this many tokens, and no further samples are read after this many in all.
SAMPLE_TOKENS = 512
TEXT_TOKENS = 10_000


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample, with the tokens of its context before it."""

    text: Branch
    context: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class EvalSequence:
    """One sequence of ``samples`` samples; the logits of slot ``rows[i]`` predict the token ``targets[i]``.

    ``rows`` and ``targets`` are int64 ``[R]``, in the order of the slots.
    """

    layout: Layout
    samples: int
    rows: Ints
    targets: Ints


def read_sequences(
    path: Path, tokenizer: Any, manifest: Manifest, branches: int
) -> tuple[list[EvalSequence], list[EvalSequence]]:
    """Sequences from the start of a file: one sample in each, and ``branches`` samples in each.

    Samples are cut at 512 tokens, or where ``branches`` of them fill the model; reading ends with the sample that
    reaches 10,000 tokens. Samples stand side by side if they are neighbours with the same context; groups of fewer than
    ``branches`` are left out.

    Raises:
        UsageError: ``branches`` is out of range.
        InputError: a file that cannot be read, has no token to predict, or has tokens outside the vocabulary.
    """
    bos_ids = _bos_ids(tokenizer)
    samples = _samples(path, tokenizer, manifest, branches, len(bos_ids))
    single = [_sequence([sample], manifest.rope_2d, bos_ids) for sample in samples]
    largest = max(int(sequence.layout.ids.max()) for sequence in single)
    if largest >= manifest.vocab_size:
        raise InputError(
            f"{path}: the artifact's tokenizer makes token {largest} of it, beyond the vocabulary of "
            f"{manifest.vocab_size}; put the tokenizer of this model into the artifact"
        )
    return single, [_sequence(group, manifest.rope_2d, bos_ids) for group in _groups(samples, branches)]


def _samples(path: Path, tokenizer: Any, manifest: Manifest, branches: int, bos_tokens: int) -> list[Sample]:
    """Samples from the start of a file; one sequence has room for a context and any ``branches`` of them."""
    longest = min(SAMPLE_TOKENS, (manifest.context_length - bos_tokens) // (branches + 1) if branches > 0 else 0)
    if longest < 2:
        raise UsageError(f"`branches` {branches} must be at least 1, and few enough to fit in the model's positions")
    rows = read_rows(path, tokenizer, longest)
    samples: list[Sample] = []
    length = 0
    for sample in (Sample(branch, row.context) for row in rows for branch in row.branches):
        samples.append(sample)
        length += len(sample.context) + len(sample.text.ids)
        if length >= TEXT_TOKENS:
            break
    if not samples:
        raise InputError(f"{path} has no text of two tokens or more; {FORMS}")
    return samples


def _bos_ids(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts at the start of a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    marked = zip(encoded.input_ids, encoded.special_tokens_mask, strict=True)
    return tuple(token for token, _ in takewhile(lambda pair: pair[1], marked))


def _groups(samples: Sequence[Sample], branches: int) -> Iterator[list[Sample]]:
    """Neighbouring samples with the same context, ``branches`` at a time."""
    for _, neighbours in groupby(samples, key=lambda sample: sample.context):
        same_context = list(neighbours)
        for start in range(0, len(same_context) - branches + 1, branches):
            yield same_context[start : start + branches]


def _sequence(samples: Sequence[Sample], spec: Rope2DSpec, bos_ids: tuple[int, ...]) -> EvalSequence:
    """Lay out samples after their context. As in ``run``, single and isolated sequences start with ``bos_ids``."""
    texts, context = [sample.text for sample in samples], samples[0].context
    if len(samples) == 1 or spec.visibility == "isolated":
        if context:
            context = bos_ids + context
        else:
            texts = [_with_bos(text, bos_ids) for text in texts]
    layout = build_layout([text.ids for text in texts], spec, context)
    slots = [np.flatnonzero(layout.owners == branch) for branch in range(len(texts))]
    pairs = list(zip(slots, texts, strict=True))
    rows = np.concatenate([branch_slots[text.start - 1 : -1] for branch_slots, text in pairs])
    targets = np.concatenate([layout.ids[branch_slots[text.start :]] for branch_slots, text in pairs])
    order = np.argsort(rows)
    return EvalSequence(layout, len(samples), rows[order], targets[order])


def _with_bos(text: Branch, bos_ids: tuple[int, ...]) -> Branch:
    """``text`` after ``bos_ids``, unless its chat template has put them there already."""
    if text.ids[: len(bos_ids)] == bos_ids:
        return text
    return Branch(bos_ids + text.ids, len(bos_ids) + text.start)
