"""The stream of events that a user of the engine reads while the engine decodes in its own thread."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from pos2d.runtime.serving.jobs import PromptScores
from pos2d.runtime.text.completions import Event

# The events of a step, the error that ended the job, or None at its end.
Item = Sequence[Event] | Exception | None


class Stream:
    """The events of one job: an asynchronous iterator of the events of each step.

    ``cached_tokens`` is the number of prompt tokens that were in the KV cache already, ``prompt_scores`` what a job
    with ``scores_prompt`` asked for, and ``admitted_at`` the monotonic time at which the job had left the queue; all of
    them hold from the first event on. A reader that leaves early must call :meth:`cancel`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, cancel: Callable[["Stream", int | None], None]) -> None:
        self.cached_tokens = 0
        self.prompt_scores: PromptScores | None = None
        self.admitted_at: float | None = None
        self.loop = loop
        self.items: asyncio.Queue[Item] = asyncio.Queue()
        self._cancel = cancel

    def cancel(self, branch: int | None = None) -> None:
        """End one branch, or the whole job, before the next step; its last events have the reason ``cancelled``."""
        self._cancel(self, branch)

    async def __aiter__(self) -> AsyncIterator[Sequence[Event]]:
        while (item := await self.items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
