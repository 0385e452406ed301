"""Sequences that run: which tokens of each are in the cache, and the groups that share forward passes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pos2d.layout import Ints
from pos2d.runtime.engine.backend import Backend, Floats, KVArrays, RowCache
from pos2d.runtime.engine.sequence import SequenceState
from pos2d.runtime.engine.spans import forward_spans
from pos2d.runtime.scheduling.prefixes import plain_length

# Sequences share passes if their numbers of branches, and of tokens, are within the same bounds: in a pass every
# sequence costs as much as the one with the most branches and the one with the most tokens.
BRANCH_BOUNDS = (1, 4, 16)
TOKEN_BOUNDS = tuple(256 * 2**step for step in range(24))

GroupKey = tuple[int, int]


@dataclass(slots=True, eq=False)
class Member:
    """A sequence that was admitted: its first ``filled`` tokens are in the cache, ``cached`` of them by copying.

    ``plain`` is the length of the beginning that other sequences may share; ``reserved`` are the tokens that it may
    grow to. ``last_logits`` has logits ``[V]`` of the last tokens of branches, by slot, while the prompt is read.
    """

    number: int
    sequence: SequenceState
    is_scored: bool
    reserved: int
    plain: int
    filled: int = 0
    cached: int = 0
    last_logits: dict[int, Floats] = field(default_factory=dict)

    @property
    def key(self) -> GroupKey:
        """The group that this sequence belongs to."""
        return (_bound(len(self.sequence.layout.last), BRANCH_BOUNDS), _bound(self.reserved, TOKEN_BOUNDS))

    @property
    def prompt(self) -> Ints:
        """The tokens of the prompt that may be copied; the last token of every branch is read, for its logits."""
        layout = self.sequence.layout
        return layout.ids[: 0 if self.is_scored else min(self.plain, *layout.last)]

    def wanted_slots(self, start: int, stop: int) -> Sequence[int]:
        """The slots of a piece whose logits are needed: all if the prompt is scored, else the last of each branch."""
        if self.is_scored:
            return range(start, stop)
        return [slot for slot in self.sequence.layout.last if start <= slot < stop]

    @property
    def held(self) -> Ints:
        """The tokens in the cache that other sequences may share."""
        return self.sequence.layout.ids[: min(self.filled, plain_length(self.sequence.layout))]


def new_member(number: int, sequence: SequenceState, is_scored: bool) -> Member:
    return Member(number, sequence, is_scored, sequence.capacity, plain_length(sequence.layout))


class Group:
    """Sequences in the rows of one cache: those that write come first, so that one pass takes exactly these."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._cache: RowCache = backend.new_rows()
        self._members: list[Member] = []
        self._writing = 0

    def __len__(self) -> int:
        return len(self._members)

    @property
    def writers(self) -> Sequence[Member]:
        return self._members[: self._writing]

    def add(self, member: Member) -> None:
        # Room for all of the prompt at once: buffers that grow with every piece of it would be copied again and again.
        self._cache.add(len(member.sequence.layout))
        self._members.append(member)

    def remove(self, member: Member) -> None:
        """Drop a sequence; the last writer takes its row, and the last reader that of the writer."""
        row, last = self._members.index(member), len(self._members) - 1
        if row < self._writing:
            self._writing -= 1
            self._move(self._writing, row)
            row = self._writing
        self._move(last, row)
        self._members.pop()
        self._cache.pop()

    def start_writing(self, member: Member) -> None:
        row = self._members.index(member)
        if row != self._writing:
            self._cache.swap(row, self._writing)
            members = self._members
            members[row], members[self._writing] = members[self._writing], members[row]
        self._writing += 1

    def take(self, member: Member, length: int) -> KVArrays:
        """A copy of the keys and values of the first ``length`` tokens of a sequence."""
        return self._cache.take(self._members.index(member), length)

    def put(self, member: Member, arrays: KVArrays) -> None:
        """Make a sequence that has read nothing begin with these keys and values."""
        self._cache.put(self._members.index(member), arrays)

    def read(self, member: Member, stop: int) -> Floats:
        """Read the prompt of a sequence up to slot ``stop``; return logits ``[R, V]`` of its wanted slots."""
        span, row = (member.filled, stop), self._members.index(member)
        rows, slots = self._cache.rows(row, row + 1), member.wanted_slots(*span)
        (logits,) = forward_spans(self._backend, [member.sequence.layout], [span], rows, [slots])
        return logits

    def write(self) -> list[tuple[Member, Floats]]:
        """Feed the newest tokens of all that write; return logits ``[N, V]`` for the live branches of each."""
        found: list[tuple[Member, Floats]] = []
        for first in range(0, self._writing, self._cache.pass_rows):
            members = self._members[first : min(first + self._cache.pass_rows, self._writing)]
            layouts = [member.sequence.layout for member in members]
            spans = [(member.filled, len(layout)) for member, layout in zip(members, layouts, strict=True)]
            slots = [range(*span) for span in spans]
            rows = self._cache.rows(first, first + len(members))
            found += zip(members, forward_spans(self._backend, layouts, spans, rows, slots), strict=True)
        return found

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self._cache.move(source, target)
            self._members[target] = self._members[source]


def stacked_logits(member: Member) -> Floats:
    """Logits ``[N, V]`` of the last token of every branch, when the prompt is read."""
    return np.stack([member.last_logits[slot] for slot in member.sequence.layout.last])


def _bound(value: int, bounds: Sequence[int]) -> int:
    return next((bound for bound in bounds if value <= bound), value)
