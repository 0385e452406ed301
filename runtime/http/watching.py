"""Follows a job from its submission to its end: its time limit, its numbers, and the client that goes away."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace

from pos2d.runtime.http.lifecycle import Lifecycle
from pos2d.runtime.http.metrics import FollowedRequest, Metrics
from pos2d.runtime.http.refusals import RefusedError
from pos2d.runtime.http.request_end import at_request_end
from pos2d.runtime.serving.streams import Stream
from pos2d.runtime.text.completions import Event


class Watch:
    """Hands on the events of streams, and cancels the jobs of which nobody reads the rest.

    ``timeout`` is the time of one request in seconds.
    """

    def __init__(self, lifecycle: Lifecycle, metrics: Metrics, timeout: float) -> None:
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._timeout = timeout

    def follow(self, stream: Stream, *, branches: int, prompt_tokens: int) -> AsyncGenerator[Sequence[Event], None]:
        """The events of ``stream``, a job of ``branches`` branches that was submitted now.

        ``prompt_tokens`` are those of the context and of all prompts. Where the time is over, or the server ends, every
        branch that still runs ends with ``length``. The job is cancelled where this iterator is closed early, and at
        the end of the HTTP request in which this was called, whether or not the iterator was ever used.

        Raises:
            RefusedError: 503, the time was over before the job had begun; raised for the first events.
        """
        run = _Run(stream, branches, self._metrics.follow(prompt_tokens))
        timer = asyncio.get_running_loop().call_later(self._timeout, run.stop)
        run.at_leave(timer.cancel)
        run.at_leave(self._lifecycle.at_end(run.stop))
        at_request_end(run.leave)
        return self._events(stream, run)

    async def _events(self, stream: Stream, run: "_Run") -> AsyncGenerator[Sequence[Event], None]:
        events = aiter(stream)
        try:
            try:
                async with asyncio.timeout(self._timeout):
                    column: Sequence[Event] | None = await anext(events, None)
            except TimeoutError:
                column = None
            if run.is_stopped and all(event.token is None for event in column or ()):
                raise RefusedError(
                    503, "the request did not begin in time", retry_after=self._metrics.seconds_per_request
                )
            while column is not None:
                yield run.seen(column)
                column = await anext(events, None)
            if run.live and run.is_stopped:
                yield run.seen([Event(branch, None, "", finish_reason="length") for branch in sorted(run.live)])
        finally:
            run.leave()


class _Run:
    """One job: which of its branches have not ended, and whether it was stopped before they had."""

    def __init__(self, stream: Stream, branches: int, followed: FollowedRequest) -> None:
        self.live = set(range(branches))
        self.is_stopped = False
        self._stream = stream
        self._followed = followed
        self._at_leave: list[Callable[[], None]] = []

    def at_leave(self, action: Callable[[], None]) -> None:
        self._at_leave.append(action)

    def stop(self) -> None:
        """Let the job end where it is."""
        self.is_stopped = True
        self._stream.cancel()

    def seen(self, events: Sequence[Event]) -> Sequence[Event]:
        """Count events; branches that were cancelled because the job was stopped end with ``length``."""
        for event in events:
            if event.finish_reason is not None:
                self.live.discard(event.branch)
        if self.is_stopped:
            events = [_stopped(event) for event in events]
        self._followed.step(events, self._stream.cached_tokens, self._stream.admitted_at)
        return events

    def leave(self) -> None:
        """Take back what was registered, and cancel what nobody reads any more; further calls do nothing."""
        if self._at_leave:
            for action in self._at_leave:
                action()
            self._at_leave = []
            if self.live:
                self._stream.cancel()
            self._followed.end(len(self.live))


def _stopped(event: Event) -> Event:
    return replace(event, finish_reason="length") if event.finish_reason == "cancelled" else event
