"""A text as the sequences in which a model reads it: every sample alone, or several side by side."""

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

SAMPLE_TOKENS = 512
TEXT_TOKENS = 10_000


@dataclass(frozen=True, slots=True)
class Sample:
    text: Branch
    context: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """One sequence. The logits of slot ``rows[i]`` predict ``targets[i]``: int64 ``[R]``, in the order of the slots."""

    layout: Layout
    samples: int
    rows: Ints
    targets: Ints


def read_text(path: Path, tokenizer: Any, manifest: Manifest, branches: int) -> tuple[list[Reading], list[Reading]]:
    """The start of a file: every sample as a sequence of its own, and ``branches`` of them in each sequence.

    Samples are cut at 512 tokens, or where ``branches`` of them fill the model; reading ends with the one that reaches
    10,000 tokens. Side by side stand neighbours with the same context; those that do not fill a sequence are left out.

    Raises:
        UsageError: ``branches`` out of range.
        InputError: an unreadable text, one without a token to predict, or with tokens that the model does not have.
    """
    opening = _opening(tokenizer)
    samples = _samples(path, tokenizer, manifest, branches, len(opening))
    alone = [_reading([sample], manifest.rope_2d, opening) for sample in samples]
    largest = max(int(reading.layout.ids.max()) for reading in alone)
    if largest >= manifest.vocab_size:
        raise InputError(
            f"{path}: the artifact's tokenizer makes token {largest} of it, beyond the vocabulary of "
            f"{manifest.vocab_size}; put the tokenizer of this model beside its weights"
        )
    return alone, [_reading(group, manifest.rope_2d, opening) for group in _side_by_side(samples, branches)]


def _samples(path: Path, tokenizer: Any, manifest: Manifest, branches: int, opening: int) -> list[Sample]:
    """The start of a file, each sample short enough to stand with ``branches`` others."""
    longest = min(SAMPLE_TOKENS, (manifest.context_length - opening) // (branches + 1) if branches > 0 else 0)
    if longest < 2:
        raise UsageError(f"branches {branches} must be at least 1, and so few that the model can hold them")
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


def _opening(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before an ordinary text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    marked = zip(encoded.input_ids, encoded.special_tokens_mask, strict=True)
    return tuple(token for token, _ in takewhile(lambda pair: pair[1], marked))


def _side_by_side(samples: Sequence[Sample], branches: int) -> Iterator[list[Sample]]:
    """Neighbours after the same context, ``branches`` at a time."""
    for _, run in groupby(samples, key=lambda sample: sample.context):
        alike = list(run)
        for start in range(0, len(alike) - branches + 1, branches):
            yield alike[start : start + branches]


def _reading(samples: Sequence[Sample], spec: Rope2DSpec, opening: tuple[int, ...]) -> Reading:
    """Lay out samples after their context; ordinary and isolated sequences start with ``opening``, as in ``run``."""
    texts, context = [sample.text for sample in samples], samples[0].context
    if len(samples) == 1 or spec.visibility == "isolated":
        if context:
            context = opening + context
        else:
            texts = [_opened(text, opening) for text in texts]
    layout = build_layout([text.ids for text in texts], spec, context)
    slots = [np.flatnonzero(layout.owners == branch) for branch in range(len(texts))]
    rows = np.concatenate([own[text.start - 1 : -1] for own, text in zip(slots, texts, strict=True)])
    targets = np.concatenate([layout.ids[own[text.start :]] for own, text in zip(slots, texts, strict=True)])
    order = np.argsort(rows)
    return Reading(layout, len(samples), rows[order], targets[order])


def _opened(text: Branch, opening: tuple[int, ...]) -> Branch:
    """``text`` after ``opening``, where its chat template has not written that already."""
    if text.ids[: len(opening)] == opening:
        return text
    return Branch(opening + text.ids, len(opening) + text.start)
