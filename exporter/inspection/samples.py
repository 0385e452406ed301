"""Text like the training data, as the branches that training lays side by side."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pos2d.errors import InputError
from pos2d.text_samples import FORMS, Branch, Row, read_rows

# Four branches show the stride; branches this short leave several sequences within the limit.
BRANCHES, BRANCH_TOKENS, TOKEN_LIMIT = 4, 128, 2000
MOST_BRANCHES = 16


@dataclass(frozen=True, slots=True)
class Sample:
    """Branches of one sequence, and the context that all of them see (empty: none)."""

    branches: tuple[Branch, ...]
    context: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.context) + sum(len(branch.ids) for branch in self.branches)


def read_samples(path: Path, tokenizer: Any, limit: int = TOKEN_LIMIT) -> list[Sample]:
    """Sequences from the start of a file until ``limit`` tokens are laid out; what follows is not read.

    A line with ``branches`` is a sequence of its own (``main`` is its context); lines and paragraphs that are one
    branch each go four to a sequence. Branches and contexts are cut at 128 tokens, sequences at 16 branches.

    Raises:
        InputError: an unreadable file, a line of another form, or no sequence with two branches.
    """
    samples: list[Sample] = []
    for sample in _grouped(read_rows(path, tokenizer, BRANCH_TOKENS)):
        if samples and sum(map(len, samples)) + len(sample) > limit:
            break
        samples.append(sample)
    if not samples:
        raise InputError(f"{path} has no two branches to lay side by side; {FORMS}")
    return samples


def _grouped(rows: Iterable[Row]) -> Iterator[Sample]:
    waiting: list[Branch] = []
    for row in rows:
        if row.several:
            if len(row.branches) > 1:
                yield Sample(row.branches[:MOST_BRANCHES], row.context)
            continue
        waiting += row.branches
        if len(waiting) == BRANCHES:
            yield Sample(tuple(waiting))
            waiting = []
    if len(waiting) > 1:
        yield Sample(tuple(waiting))
