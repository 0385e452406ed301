"""The scheduler: requests join and leave between forward passes, and every pass serves as many of them as it can."""

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

from pos2d.errors import InputError
from pos2d.runtime.engine.backend import Backend, Floats
from pos2d.runtime.engine.sequence import Column, SequenceState
from pos2d.runtime.scheduling.members import Group, GroupKey, Member, new_member, stacked_logits
from pos2d.runtime.scheduling.pace import Pace
from pos2d.runtime.scheduling.prefixes import LEAST_SHARED, PrefixStore, first_tokens, shared_length

# Of so many pieces one is of the prompt that waits longest; the others are of the prompt that is read soonest.
OLDEST_FIRST_EVERY = 4
# Receives the first slot and logits ``[S, V]`` of the tokens of a prompt, piece by piece.
ScoreListener = Callable[[int, Floats], None]


@dataclass(frozen=True, slots=True)
class Limits:
    """What may run at the same time: branches, and tokens of KV cache (``kv_tokens``).

    Of these, ``kept_tokens`` may be those of requests that have ended, as long as no running request needs them.
    """

    branches: int
    kv_tokens: int
    kept_tokens: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did for one request: the next ``column`` of its tokens, or the ``error`` that ended it.

    ``cached_tokens`` of its prompt did not have to be read.
    """

    number: int
    column: Column | None
    cached_tokens: int
    error: Exception | None = None


class Scheduler:
    """Decodes requests, each a sequence of its own on the batch axis: no sequence has tokens of two requests.

    A request gives the columns that it gives alone. ``pace`` sets the sizes of the pieces in which prompts are read.
    ``keeps_prompts``: the keys and values of requests that have ended stay, as long as no running request needs the
    room, for prompts that begin with the same tokens; otherwise only contexts stay.
    """

    def __init__(self, backend: Backend, limits: Limits, pace: Pace, *, keeps_prompts: bool = False) -> None:
        self.limits = limits
        self.store = PrefixStore(limits.kept_tokens)
        self._backend, self._pace, self._keeps_prompts = backend, pace, keeps_prompts
        self._numbers = count()
        self._waiting: deque[Member] = deque()
        self._reading: list[Member] = []
        self._groups: dict[GroupKey, Group] = {}
        self._listeners: dict[int, ScoreListener] = {}
        self._pieces = 0
        self._reads_next = False

    @property
    def running(self) -> list[Member]:
        """The requests that were admitted."""
        return [*self._reading, *(member for group in self._groups.values() for member in group.writers)]

    @property
    def waiting(self) -> int:
        """The number of requests that were not admitted yet."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._groups

    @property
    def kv_tokens(self) -> int:
        """The tokens of KV cache that running requests have reserved."""
        return sum(member.reserved for member in self.running)

    @property
    def room(self) -> int:
        """The tokens of KV cache that running requests can have."""
        return self.limits.kv_tokens - self.store.staying_tokens

    def check(self, sequence: SequenceState) -> None:
        """Check that a request fits alone.

        Raises:
            InputError: it has more branches than may run, or may grow to more tokens than the KV cache has.
        """
        branches, tokens = len(sequence.layout.last), sequence.capacity
        if branches > self.limits.branches:
            raise InputError(f"the request has {branches} branches, at most {self.limits.branches} run at once")
        if tokens > self.room:
            raise InputError(
                f"the request may grow to {tokens} tokens, the KV cache has room for {self.room}; "
                "shorten the prompt or lower `max_new_tokens`"
            )

    def add(self, sequence: SequenceState, on_scores: ScoreListener | None = None) -> int:
        """Queue a request; return its number. ``on_scores`` gets the logits of all tokens of its prompt.

        Raises:
            InputError: see :meth:`check`.
        """
        self.check(sequence)
        number = next(self._numbers)
        if on_scores is not None:
            self._listeners[number] = on_scores
        self._waiting.append(new_member(number, sequence, on_scores is not None))
        return number

    def cancel(self, number: int, branch: int | None = None) -> None:
        """End a request, or one branch of it, before the next step; a request that has ended is left alone.

        The tokens of a cancelled branch stay visible to the others. Without a live branch the request ends.
        """
        member = next((m for m in (*self._waiting, *self.running) if m.number == number), None)
        if member is None:
            return
        if branch is not None:
            member.sequence.cancel(branch)
        if branch is None or not member.sequence.live:
            self._drop(member)

    def step(self) -> list[StepResult]:
        """Run the next forward pass, or passes: a piece of a prompt, or the next tokens of all that write.

        The two take turns.
        """
        failed = self._admit()
        writers = sum(len(group.writers) for group in self._groups.values())
        reads = bool(self._reading) and (self._reads_next or not writers)
        self._reads_next = not reads
        return failed + (self._read(writers) if reads else self._write())

    def _admit(self) -> list[StepResult]:
        """Admit the requests that have waited longest, as long as there is room for the first of them.

        Return those for which there is no memory.
        """
        failed: list[StepResult] = []
        while self._waiting:
            member, running = self._waiting[0], self.running
            branches = sum(len(m.sequence.live) for m in running) + len(member.sequence.live)
            tokens = self.kv_tokens + member.reserved
            if branches > self.limits.branches or tokens > self.room:
                break
            self.store.shrink(self.limits.kv_tokens - tokens)
            try:
                self._group(member).add(member)
            except Exception as error:
                failed.append(self._fail(member, error))
                self._close_empty_group(member.key)
                continue
            self._waiting.popleft()
            self._reading.append(member)
        return failed

    def _read(self, writers: int) -> list[StepResult]:
        """Read a piece of one prompt."""
        member = self._next_reader()
        try:
            logits = self._read_piece(member, writers)
        except Exception as error:
            return [self._fail(member, error)]
        return [] if logits is None else [self._advance(member, logits)]

    def _read_piece(self, member: Member, writers: int) -> Floats | None:
        """Read a piece; return logits ``[N, V]`` for the live branches after the last one."""
        group = self._group(member)
        if member.filled == 0:
            self._copy_prefix(member, group)
        started = time.perf_counter()
        start, layout, bound = member.filled, member.sequence.layout, member.key[1]
        stop = min(len(layout), start + self._pace.piece(writers, bound))
        logits = group.read(member, stop)
        member.filled = stop
        self._pace.read(stop - start, bound, time.perf_counter() - started)
        rows_by_slot = zip(member.wanted_slots(start, stop), logits, strict=True)
        last = set(layout.last)
        member.last_logits |= {slot: row for slot, row in rows_by_slot if slot in last}
        if member.is_scored:
            self._listeners[member.number](start, logits)
        if stop < len(layout):
            return None
        group.start_writing(member)
        self._reading.remove(member)
        row_logits = stacked_logits(member)[member.sequence.live]
        member.last_logits = {}
        return row_logits

    def _write(self) -> list[StepResult]:
        """Feed the newest tokens of all requests that write, group by group."""
        found: list[StepResult] = []
        started = time.perf_counter()
        for group in [group for group in self._groups.values() if group.writers]:
            try:
                written = group.write()
            except Exception as error:
                found += [self._fail(member, error) for member in list(group.writers)]
                continue
            for member, logits in written:
                member.filled = len(member.sequence.layout)
                found.append(self._advance(member, logits))
        self._pace.wrote(time.perf_counter() - started)
        return found

    def _advance(self, member: Member, logits: Floats) -> StepResult:
        """Choose the next column of a request from logits ``[N, V]`` of its live branches."""
        try:
            column = member.sequence.step(logits)
        except Exception as error:  # whatever it is, it comes from the options and the answer of this request
            return self._fail(member, error)
        if not member.sequence.live:
            self._keep(member)
            self._drop(member)
        return StepResult(member.number, column, member.cached)

    def _fail(self, member: Member, error: Exception) -> StepResult:
        self._drop(member)
        return StepResult(member.number, None, member.cached, error)

    def _drop(self, member: Member) -> None:
        self._listeners.pop(member.number, None)
        if member in self._waiting:
            self._waiting.remove(member)
            return
        if member in self._reading:
            self._reading.remove(member)
        self._group(member).remove(member)
        self._close_empty_group(member.key)

    def _group(self, member: Member) -> Group:
        if member.key not in self._groups:
            self._groups[member.key] = Group(self._backend)
        return self._groups[member.key]

    def _close_empty_group(self, key: GroupKey) -> None:
        if key in self._groups and not len(self._groups[key]):
            del self._groups[key]

    def _next_reader(self) -> Member:
        """The prompt to read now, but none whose beginning is just being read for another request."""
        ready = [member for i, member in enumerate(self._reading) if not self._waits_for(member, self._reading[:i])]
        self._pieces += 1
        if self._pieces % OLDEST_FIRST_EVERY == 0:
            return ready[0]
        return min(ready, key=lambda member: len(member.sequence.layout) - member.filled)

    def _waits_for(self, member: Member, older: list[Member]) -> bool:
        """Whether a prompt that is not begun shares more with an older one than was read of it."""
        if member.filled:
            return False
        shared = (shared_length(other.prompt, member.prompt) - other.filled for other in older)
        return any(length >= LEAST_SHARED for length in shared)

    def _copy_prefix(self, member: Member, group: Group) -> None:
        """Copy the longest beginning of a prompt that another request holds, or that was kept."""
        length, arrays = self.store.find(member.prompt)
        holders = [other for other in self.running if other is not member]
        lengths = [shared_length(other.held, member.prompt) for other in holders]
        if lengths and max(lengths) > max(length, LEAST_SHARED - 1):
            length = max(lengths)
            holder = holders[lengths.index(length)]
            arrays = self._group(holder).take(holder, length)
        if arrays is not None:
            group.put(member, first_tokens(arrays, length))
            member.filled = member.cached = length

    def _keep(self, member: Member) -> None:
        """Keep what later requests may begin with, if there is room for it beside the running requests."""
        ids = member.held if self._keeps_prompts else member.held[: member.plain]
        has_context = member.plain < len(member.sequence.layout) and (member.sequence.layout.owners == -1).any()
        if len(ids) < LEAST_SHARED or not (self._keeps_prompts or has_context) or self.store.holds(ids):
            return
        room = min(self.limits.kept_tokens, self.limits.kv_tokens - self.kv_tokens)
        if len(ids) <= room:
            with suppress(MemoryError, RuntimeError):  # what is kept saves time, and is never needed
                self.store.add(ids.copy(), self._group(member).take(member, len(ids)))
                self.store.shrink(room)
