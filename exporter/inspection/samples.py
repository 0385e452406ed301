"""Text like the training data, grouped into sequences of branches as training does it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pos2d.errors import InputError
from pos2d.text_samples import FORMS, Branch, Row, read_rows

# Four branches make strides distinguishable, and branches this short give more than one sequence within the limit.
BRANCHES, BRANCH_TOKENS, TOKEN_LIMIT = 4, 128, 2000
MAX_BRANCHES = 16


@dataclass(frozen=True, slots=True)
class Sample:
    """The branches of one sequence, and the context that all of them attend to (empty: none)."""

    branches: tuple[Branch, ...]
    context: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.context) + sum(len(branch.ids) for branch in self.branches)


def read_samples(path: Path, tokenizer: Any, limit: int = TOKEN_LIMIT) -> list[Sample]:
    """Read sequences from the start of a file, up to ``limit`` tokens in all.

    A line with ``branches`` is one sequence (``main`` is its context); lines and paragraphs that are one branch each
    are grouped by four. Branches and contexts are truncated to 128 tokens, sequences to 16 branches.

    Raises:
        InputError: a file that cannot be read, a line in an unknown form, or no sequence with two branches.
    """
    samples: list[Sample] = []
    for sample in _grouped(read_rows(path, tokenizer, BRANCH_TOKENS)):
        if samples and sum(map(len, samples)) + len(sample) > limit:
            break
        samples.append(sample)
    if not samples:
        raise InputError(f"{path} has no two branches for one sequence; {FORMS}")
    return samples


def first_branches(sample: Sample, count: int) -> Sample:
    """The same sequence with its first ``count`` branches alone."""
    return Sample(sample.branches[:count], sample.context)


def _grouped(rows: Iterable[Row]) -> Iterator[Sample]:
    pending: list[Branch] = []
    for row in rows:
        if row.grouped:
            if len(row.branches) > 1:
                yield Sample(row.branches[:MAX_BRANCHES], row.context)
            continue
        pending += row.branches
        if len(pending) == BRANCHES:
            yield Sample(tuple(pending))
            pending = []
    if len(pending) > 1:
        yield Sample(tuple(pending))
