"""Answers the jobs of several users at once, in a thread of its own, and hands every user a stream of events."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from pos2d.layout import CONTEXT
from pos2d.runtime.engine.sequence import check_length
from pos2d.runtime.serving.jobs import BusyError, EngineLoad, Job, PromptScores
from pos2d.runtime.text.artifact import LoadedArtifact
from pos2d.runtime.text.completions import Event
from pos2d.runtime.text.text_decode import decode_text


class Stream:
    """The events of one job: an asynchronous iterator of the events of each step.

    ``cached_tokens`` is the number of prompt tokens that were in the KV cache already, and ``prompt_scores`` what a job
    with ``scores_prompt`` asked for; both hold from the first event on. A reader that leaves early must call
    :meth:`cancel`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, branches: int) -> None:
        self.cached_tokens = 0
        self.prompt_scores: PromptScores | None = None
        self._loop = loop
        self._items: asyncio.Queue[Sequence[Event] | BaseException | None] = asyncio.Queue()
        self._cancelled: set[int] = set()
        self._branches = branches

    def cancel(self, branch: int | None = None) -> None:
        """End one branch, or the whole job; what was generated so far stays."""
        self._cancelled |= set(range(self._branches)) if branch is None else {branch}

    async def __aiter__(self) -> AsyncIterator[Sequence[Event]]:
        while (item := await self._items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def put(self, item: Sequence[Event] | BaseException | None) -> None:
        """Hand over an item from another thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    @property
    def is_cancelled(self) -> bool:
        return len(self._cancelled) == self._branches


class Engine:
    """Decodes the jobs that :meth:`submit` accepts.

    ``max_waiting`` jobs may wait; ``kv_budget`` is the number of tokens whose keys and values running jobs may have.
    """

    def __init__(self, artifact: LoadedArtifact, *, max_waiting: int = 64, kv_budget: int | None = None) -> None:
        self.artifact = artifact
        self.kv_budget = kv_budget or 16 * artifact.manifest.context_length
        self._max_waiting = max_waiting
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pos2d")
        self._open: set[Stream] = set()
        self._lock = threading.Lock()

    def check(self, job: Job) -> None:
        """Check that a job can run at all, before anything is allocated for it.

        Raises:
            InputError: it has more tokens than the model has positions, or than the KV budget.
        """
        check_length(job.layout, self.artifact.manifest.context_length)

    async def submit(self, job: Job) -> Stream:
        """Queue a job.

        Raises:
            InputError: as :meth:`check`.
            BusyError: too many jobs wait.
        """
        self.check(job)
        with self._lock:
            if len(self._open) > self._max_waiting:
                raise BusyError(f"{len(self._open)} requests are waiting; try again later", 1.0)
            stream = Stream(asyncio.get_running_loop(), len(job.layout.last))
            self._open.add(stream)
        self._worker.submit(self._answer, job, stream)
        return stream

    def load(self) -> EngineLoad:
        """What the engine is doing now."""
        with self._lock:
            count = len(self._open)
        return EngineLoad(min(count, 1), max(count - 1, 0), min(count, 1), 0, self.kv_budget)

    def close(self) -> None:
        """Finish the jobs that were accepted, and stop."""
        self._worker.shutdown(wait=True)

    def _answer(self, job: Job, stream: Stream) -> None:
        try:
            assert (job.layout.owners >= CONTEXT).all()
            for events in decode_text(self.artifact, job.layout, job.samplings, job.random_streams):
                stream.put(events)
                if stream.is_cancelled:
                    break
            stream.put(None)
        except BaseException as error:
            stream.put(error)
        finally:
            with self._lock:
                self._open.discard(stream)
