"""Answers the jobs of several users at once, in a thread of its own, and hands every user a stream of events."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue

import numpy as np

from pos2d.errors import UsageError
from pos2d.layout import Layout
from pos2d.runtime.engine.backend import KVArrays
from pos2d.runtime.engine.sequence import SequenceState
from pos2d.runtime.scheduling.pace import MeasuredPieces
from pos2d.runtime.scheduling.scheduler import Limits, Scheduler, StepResult
from pos2d.runtime.serving.jobs import BusyError, EngineLoad, Job
from pos2d.runtime.serving.prompt_scorer import PromptScorer
from pos2d.runtime.serving.streams import Item, Stream
from pos2d.runtime.text.artifact import LoadedArtifact
from pos2d.runtime.text.text_decode import ColumnEvents, text_samplers

# Branches that decode at the same time unless the caller says otherwise.
MAX_BRANCHES = 16
# Tokens of ended requests that stay in the KV cache, in contexts of the model.
KEPT_CONTEXTS = 2
# Weight of the newest interval between the ends of two jobs in their running mean, and bounds of what clients are told.
NEWEST, LEAST_RETRY, MOST_RETRY = 0.2, 1.0, 60.0
# Branches and tokens of KV cache of the smallest job: one that would have to wait makes every other one wait.
SMALLEST = (1, 1)
# Items for streams, in their order.
Deliveries = list[tuple[Stream, Item]]


@dataclass(frozen=True, slots=True, eq=False)
class PreparedJob:
    """A job that was checked, with the state that decoding it changes."""

    layout: Layout
    sequence: SequenceState
    events: ColumnEvents
    scorer: PromptScorer | None


@dataclass(slots=True, eq=False)
class _Open:
    """A job that has not ended; ``number`` is the scheduler's, once it has the job."""

    stream: Stream
    job: PreparedJob
    number: int = -1
    is_running: bool = False


class Engine:
    """Decodes the jobs that :meth:`submit` accepts.

    At most ``branches`` decode at the same time, running jobs have at most ``kv_budget`` tokens of KV cache, and at
    most ``max_waiting`` jobs wait for room.
    """

    def __init__(
        self,
        artifact: LoadedArtifact,
        *,
        branches: int = MAX_BRANCHES,
        kv_budget: int | None = None,
        max_waiting: int = 16,
    ) -> None:
        self.artifact = artifact
        self._max_waiting = max_waiting
        tokens = kv_budget or default_kv_budget(artifact, branches)
        self._scheduler = Scheduler(
            artifact.backend,
            Limits(branches, tokens, min(tokens, KEPT_CONTEXTS * artifact.manifest.context_length)),
            MeasuredPieces(artifact.backend.prefill_chunk),
            keeps_prompts=True,
        )
        self._commands: SimpleQueue[Callable[[], Deliveries] | None] = SimpleQueue()
        self._open: dict[Stream, _Open] = {}
        self._by_number: dict[int, _Open] = {}
        self._lock = threading.Lock()
        self._load = EngineLoad(0, 0, 0, 0, self.kv_budget)  # replaced as a whole by the engine's thread
        self._defect: Exception | None = None
        self._closed = False
        self._last_end: float | None = None
        self._end_interval = LEAST_RETRY
        self._thread = threading.Thread(target=self._run, name="pos2d-engine", daemon=True)
        self._thread.start()

    @property
    def kv_budget(self) -> int:
        """The tokens of KV cache that running jobs can have: without those of :meth:`keep`."""
        return self._scheduler.room

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def prepare(self, job: Job) -> PreparedJob:
        """Check a job, before anything is allocated for it; any thread may call this.

        Raises:
            InputError: it has more tokens than the model has positions, or it does not fit in the KV budget alone.
            UsageError: options that this artifact cannot use.
        """
        samplers = text_samplers(self.artifact, job.layout, job.samplings, job.random_streams)
        sequence = SequenceState(job.layout, samplers, self.artifact.manifest.context_length)
        self._scheduler.check(sequence)
        top = max(sampling.top_logprobs for sampling in job.samplings)
        scorer = PromptScorer(job.layout, top) if job.scores_prompt else None
        return PreparedJob(job.layout, sequence, ColumnEvents(samplers), scorer)

    def check_room(self) -> None:
        """Check that a job of which nothing is known yet may wait; any thread may call this.

        Raises:
            BusyError: too many jobs wait.
        """
        with self._lock:
            self._check_room(*SMALLEST)

    async def submit(self, job: PreparedJob) -> Stream:
        """Queue a job, once.

        Raises:
            BusyError: too many jobs wait.
            UsageError: the engine was closed.
            Exception: what ended the engine's thread, if that has ended.
        """
        stream = Stream(asyncio.get_running_loop(), self._cancel)
        opened = _Open(stream, job)
        with self._lock:
            if self._defect is not None:
                raise self._defect
            if self._closed:
                raise UsageError("the engine is closed")
            self._check_room(*_size(job.sequence))
            self._open[stream] = opened
            self._commands.put(lambda: self._add(opened))
        return stream

    def keep(self, ids: Sequence[int], arrays: KVArrays) -> None:
        """Keep the keys and values of tokens with which later prompts begin; before the first job is submitted."""
        self._scheduler.store.add(np.array(ids, dtype=np.int64), arrays, stays=True)

    def load(self) -> EngineLoad:
        """What the engine is doing now."""
        with self._lock:
            return replace(self._load, waiting=self._waiting())

    def close(self) -> None:
        """Finish the jobs that were accepted, and stop."""
        with self._lock:
            self._closed = True
            self._commands.put(None)
        self._thread.join()

    def _check_room(self, branches: int, tokens: int) -> None:
        """Check that a new job may wait, if it has to, that has so many branches and tokens of KV cache."""
        if self._waiting((branches, tokens)) > self._max_waiting:
            raise BusyError(f"{self._max_waiting} requests are waiting already; try again later", self._retry_after())

    def _waiting(self, *new: tuple[int, int]) -> int:
        """The number of jobs, of those that have not begun and ``new`` ones, that have to wait for room."""
        branches, tokens = self._load.branches, self._load.kv_tokens
        queued = [*(_size(opened.job.sequence) for opened in self._open.values() if not opened.is_running), *new]
        for number, size in enumerate(queued):
            branches += size[0]
            tokens += size[1]
            if branches > self._scheduler.limits.branches or tokens > self.kv_budget:
                return len(queued) - number
        return 0

    def _cancel(self, stream: Stream, branch: int | None) -> None:
        self._commands.put(lambda: self._end_early(stream, branch))

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # a defect of the engine itself: its users must not wait for ever
            defect = error if isinstance(error, Exception) else RuntimeError(f"the engine ended: {error!r}")
            with self._lock:
                self._defect = defect
                opened, self._open = list(self._open), {}
            self._load = EngineLoad(0, 0, 0, 0, self.kv_budget)
            _hand_over([(stream, item) for stream in opened for item in (defect, None)])
            raise

    def _serve(self) -> None:
        """Carry out commands and run steps, until the engine is closed and all jobs have ended."""
        closing = False
        while True:
            while not self._commands.empty() or (self._scheduler.is_idle and not closing):
                command = self._commands.get()
                closing = closing or command is None
                self._deliver(command() if command is not None else [])
            if self._scheduler.is_idle:
                return
            self._deliver([item for progress in self._scheduler.step() for item in self._items(progress)])

    def _add(self, opened: _Open) -> Deliveries:
        opened.number = self._scheduler.add(opened.job.sequence, opened.job.scorer)
        self._by_number[opened.number] = opened
        return []

    def _end_early(self, stream: Stream, branch: int | None) -> Deliveries:
        opened = self._open.get(stream)
        if opened is None:
            return []
        self._scheduler.cancel(opened.number, branch)
        if branch is not None and opened.job.sequence.live:
            return []
        return [(stream, opened.job.events.cancelled()), *self._ended(opened)]

    def _items(self, progress: StepResult) -> Deliveries:
        """What the stream of a job gets after a step."""
        opened = self._by_number[progress.number]
        opened.stream.cached_tokens = progress.cached_tokens
        if progress.error is not None:
            return self._failed(opened, progress.error)
        assert progress.column is not None
        try:
            if opened.job.scorer is not None and opened.stream.prompt_scores is None:
                opened.stream.prompt_scores = opened.job.scorer.scores()
            items: Deliveries = [(opened.stream, opened.job.events.of(progress.column))]
        except Exception as error:  # of the text of this answer
            self._scheduler.cancel(progress.number)
            return self._failed(opened, error)
        return items if opened.job.sequence.live else [*items, *self._ended(opened)]

    def _failed(self, opened: _Open, error: Exception) -> Deliveries:
        return [(opened.stream, error), *self._ended(opened)]

    def _ended(self, opened: _Open) -> Deliveries:
        with self._lock:
            del self._open[opened.stream]
            self._by_number.pop(opened.number, None)
            now = time.monotonic()
            if self._last_end is not None:
                self._end_interval += NEWEST * (now - self._last_end - self._end_interval)
            self._last_end = now
        return [(opened.stream, None)]

    def _retry_after(self) -> float:
        """Seconds after which half of those that wait will have begun."""
        return min(MOST_RETRY, max(LEAST_RETRY, self._max_waiting / 2 * self._end_interval))

    def _deliver(self, deliveries: Deliveries) -> None:
        """Publish what the engine is doing, and hand over items to the readers of the streams."""
        running = self._scheduler.running
        for member in running:
            opened = self._by_number[member.number]
            if not opened.is_running:
                opened.is_running, opened.stream.admitted_at = True, time.monotonic()
        self._load = EngineLoad(
            running=len(running),
            waiting=0,
            branches=sum(len(member.sequence.live) for member in running),
            kv_tokens=sum(member.reserved for member in running),
            kv_budget=self.kv_budget,
        )
        for stream in _hand_over(deliveries):
            stream.cancel()


def _size(sequence: SequenceState) -> tuple[int, int]:
    """The branches of a job, and its tokens of KV cache."""
    return len(sequence.live), sequence.capacity


def default_kv_budget(artifact: LoadedArtifact, branches: int) -> int:
    """Tokens of KV cache that half of the free memory holds, but no more than so many branches can use."""
    import psutil

    room = psutil.virtual_memory().available // 2 // artifact.backend.kv_format.token_bytes
    return min(room, branches * artifact.manifest.context_length)


def _hand_over(deliveries: Deliveries) -> set[Stream]:
    """Put items into the queues of their streams, with one call for each event loop; return those nobody can read."""
    unread: set[Stream] = set()
    for loop in {stream.loop for stream, _ in deliveries}:
        pairs = [pair for pair in deliveries if pair[0].loop is loop]
        try:
            loop.call_soon_threadsafe(_put_all, pairs)
        except RuntimeError:  # the loop was closed
            unread |= {stream for stream, _ in pairs}
    return unread


def _put_all(deliveries: Deliveries) -> None:
    for stream, item in deliveries:
        stream.items.put_nowait(item)
