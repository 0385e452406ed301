"""The records of a window of lines, which are decoded together; lines never share a sequence."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pos2d.errors import Pos2DError
from pos2d.runtime.batching.lines import Line
from pos2d.runtime.engine.prefix_cache import PrefixCache
from pos2d.runtime.engine.sequence import SequenceState
from pos2d.runtime.scheduling.pace import WholeChunks
from pos2d.runtime.scheduling.scheduler import Limits, Scheduler, StepResult
from pos2d.runtime.text.artifact import LoadedArtifact
from pos2d.runtime.text.completions import Completion, Event, completion
from pos2d.runtime.text.requests import fill_from_store
from pos2d.runtime.text.text_decode import ColumnEvents, text_samplers

# The share of the machine's memory that keys and values may take. All of it counts, not what happens to be free: which
# lines run together, and so the rounding of their logits, must be the same when an interrupted run continues.
KV_SHARE = 4
# More branches than the graph for one can compute.
MANY = 2


@dataclass(slots=True, eq=False)
class _Sequence:
    """A running sequence of a line, whose first branch is prompt ``first`` of the line."""

    line: "_Answering"
    state: SequenceState
    events: ColumnEvents
    first: int


@dataclass(slots=True, eq=False)
class _Answering:
    """A line with the events of its answers so far, by prompt."""

    line: Line
    unfinished: int
    events: list[list[Event]] = field(default_factory=list)
    error: Pos2DError | None = None

    def result(self) -> tuple[Line, list[Completion]]:
        """The line with its completions; one that failed has an error in their place."""
        if self.error is not None:
            return replace(self.line, request=None, error=" ".join(str(self.error).split())), []
        return self.line, [completion("", events) for events in self.events]


def records_in_order(
    artifact: LoadedArtifact, lines: Sequence[Line], done: int, branches_per_sequence: int
) -> Iterator[list[dict[str, Any]]]:
    """Answer the lines of one window; yield the records after the first ``done`` of the file, in the order of lines.

    All lines are decoded again, also those that the file has: what a line gives may depend, by rounding, on which lines
    are decoded beside it.
    """
    running = _Window(artifact, lines, branches_per_sequence)
    ready = {line.number: _record(line, []) for line in lines if line.request is None}
    following = lines[0].number
    while True:
        records = []
        while following in ready:
            records.append(ready.pop(following))
            following += 1
        new = records[max(0, done + len(records) + 1 - following) :]
        if new:
            yield new
        if running.is_idle:
            return
        for line, completions in running.step():
            ready[line.number] = _record(line, completions)


class _Window:
    """The lines of one window in a scheduler of their own."""

    def __init__(self, artifact: LoadedArtifact, lines: Sequence[Line], branches: int) -> None:
        sequences = [sequence for line in lines for sequence in _sequences(artifact, line)]
        widest = max((len(sequence.state.live) for sequence in sequences), default=1)
        longest = max((sequence.state.capacity for sequence in sequences), default=1)
        import psutil  # doctor says what is missing, and imports this file

        room = psutil.virtual_memory().total // KV_SHARE // artifact.backend.kv_format.token_bytes
        tokens = max(room, longest)
        limits = Limits(max(branches, widest), tokens, tokens)
        self._scheduler = Scheduler(artifact.backend, limits, WholeChunks(artifact.backend.prefill_chunk))
        # A graph that any line may need computes all of them, and their contexts: graphs round differently, and which
        # windows came before depends on where a run was interrupted.
        artifact.backend.expect_branches(MANY)
        artifact.backend.new_rows()
        self._fill_from_store(artifact, lines)
        self._sequences = {self._scheduler.add(sequence.state): sequence for sequence in sequences}

    def _fill_from_store(self, artifact: LoadedArtifact, lines: Sequence[Line]) -> None:
        """Give the scheduler the contexts that lines have in files, and write the files that do not exist."""
        for line in lines:
            request = line.request
            if request is None or request.cache_context is None or not request.encoded.context:
                continue
            if not self._scheduler.store.holds(np.array(request.encoded.context)):
                prefix = PrefixCache(artifact.backend, request.spec, artifact.manifest.context_length)
                fill_from_store(artifact, prefix, request)
                self._scheduler.store.add(np.array(prefix.ids), prefix.cache.take(len(prefix.ids)))

    @property
    def is_idle(self) -> bool:
        return self._scheduler.is_idle

    def step(self) -> Iterator[tuple[Line, list[Completion]]]:
        """Run one step; yield the lines that are answered now, with their completions or an error."""
        for progress in self._scheduler.step():
            sequence = self._sequences[progress.number]
            _note(sequence, progress)
            answering = sequence.line
            if progress.error is not None or not sequence.state.live:
                answering.unfinished -= 1
                if not answering.unfinished:
                    yield answering.result()


def _sequences(artifact: LoadedArtifact, line: Line) -> Iterator[_Sequence]:
    """The sequences of a line, with the random numbers that its prompts have in a request of their own."""
    request = line.request
    if request is None:
        return
    answering = _Answering(line, len(request.layouts), [[] for _ in request.encoded.branches])
    first = 0
    for layout in request.layouts:
        branches = range(first, first + len(layout.last))
        samplers = text_samplers(artifact, layout, [request.sampling] * len(branches), [(k,) for k in branches])
        state = SequenceState(layout, samplers, artifact.manifest.context_length)
        yield _Sequence(answering, state, ColumnEvents(samplers), first)
        first = branches.stop


def _note(sequence: _Sequence, progress: StepResult) -> None:
    """Add what a step gave to the events of the line, or its error.

    Raises:
        Exception: an error that is not about the line.
    """
    if progress.error is not None:
        if not isinstance(progress.error, Pos2DError):
            raise progress.error
        sequence.line.error = sequence.line.error or progress.error
        return
    assert progress.column is not None
    for event in sequence.events.of(progress.column):
        sequence.line.events[sequence.first + event.branch].append(event)


def _record(line: Line, completions: Sequence[Completion]) -> dict[str, Any]:
    head = {"line": line.number, **line.echoed}
    if line.error is not None:
        return head | {"error": line.error}
    return head | {"completions": [_completion(completion) for completion in completions]}


def _completion(completion: Completion) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "new_tokens": len(completion.token_ids),
    }
    for name in ("logprobs", "top_logprobs"):
        if getattr(completion, name) is not None:
            facts[name] = list(getattr(completion, name))
    return facts
